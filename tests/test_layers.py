"""The order of the packages: none imports one above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: From the bottom to the top; each may import itself and what is before it.
PACKAGES = [
    (
        *('mmagvm.version', 'mmagvm.errors'),
        *('mmagvm.markdown', 'mmagvm.strict_json'),
    ),
    ('mmagvm.core',),
    ('mmagvm.recipes', 'mmagvm.datasets', 'mmagvm.models'),
    ('mmagvm.engine',),
    ('mmagvm.analysis',),
    ('mmagvm.planning', 'mmagvm.launch', 'mmagvm.checks'),
    ('benchmarks',),
    ('study',),
]
HOSTS = ('mmengine', 'mmcv', 'mmdet', 'mmseg')
SOURCES = [
    path
    for folder in ('mmagvm', 'tools', 'tests')
    for path in sorted((ROOT / folder).rglob('*.py'))
]


def imported(path):
    """Names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f'{node.module}.{name.name}' for name in node.names)


def layer(name):
    """The place of a module in PACKAGES; None for those of other packages."""
    for place, packages in enumerate(PACKAGES):
        if any(f'{name}.'.startswith(f'{room}.') for room in packages):
            return place
    return None


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[1:] if parts[0] == 'tools' else parts)


@pytest.mark.parametrize(
    'path',
    [path for path in SOURCES if layer(module_of(path)) is not None],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_nothing_imports_what_is_above(path):
    own = layer(module_of(path))
    for name in imported(path):
        place = layer(name)
        assert place is None or place <= own, name
        if own == 1:
            assert name.partition('.')[0] not in HOSTS, name


@pytest.mark.parametrize(
    'path', SOURCES, ids=lambda path: str(path.relative_to(ROOT))
)
def test_import_path_is_not_edited(path):
    if path != Path(__file__):
        assert 'sys.path' not in path.read_text()
