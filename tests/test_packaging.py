"""The packages to install: the source archive, and the wheel built from it."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import ROOT
from mmengine.config import Config

#: Folders of a checkout that are not part of the project.
LEFT_OUT = ('.*', 'work_dirs', 'data', 'build', 'dist', '__pycache__')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel, built from the source archive of a copy of this checkout."""
    folder = tmp_path_factory.mktemp('packaging')
    ignore = shutil.ignore_patterns(*LEFT_OUT, '*.egg-info', '*.pyc')
    shutil.copytree(ROOT, folder / 'copy', ignore=ignore)
    code = f'from setuptools.build_meta import *; build_sdist({str(folder)!r})'
    call(sys.executable, '-c', code, cwd=folder / 'copy')
    pip = (sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-index')
    archive = next(folder.glob('mmagvm-*.tar.gz'))
    call(*pip, '--no-build-isolation', archive, '-w', folder, cwd=folder)
    with zipfile.ZipFile(next(folder.glob('mmagvm-*.whl'))) as file:
        yield file


def call(*args, cwd):
    done = subprocess.run(
        args,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_wheel_carries_configs_and_tools(wheel):
    packed = {
        name.partition('mmagvm/.mim/')[2]: wheel.getinfo(name)
        for name in wheel.namelist()
        if name.startswith('mmagvm/.mim/')
    }
    ours = {
        str(path.relative_to(ROOT)): path
        for folder in ('configs', 'tools')
        for path in (ROOT / folder).rglob('*')
        if path.is_file()
        and not {'__pycache__', 'benchmarks', 'study'} & set(path.parts)
        and '.egg-info' not in str(path)
        and path != ROOT / 'tools/pyproject.toml'
    }
    packed.pop('model-index.yml', None)
    assert packed.keys() == ours.keys()
    for name, info in packed.items():
        assert wheel.read(info) == ours[name].read_bytes()
        # the bits of rwx: scripts stay executable
        mode = ours[name].stat().st_mode & 0o111
        assert info.external_attr >> 16 & 0o111 == mode, name


def test_wheel_carries_the_whole_package_and_no_more(wheel):
    packed = {
        name
        for name in wheel.namelist()
        if '/.mim/' not in name and '.dist-info/' not in name
    }
    assert packed == {
        str(path.relative_to(ROOT)) for path in ROOT.glob('mmagvm/**/*.py')
    } | {'mmagvm/analysis/report.html'}


def test_wheel_forces_no_package_set(wheel):
    """OpenMMLab and its fork are extras only, and each is complete."""
    name = next(n for n in wheel.namelist() if n.endswith('/METADATA'))
    metadata = Parser().parsestr(wheel.read(name).decode())
    needs = {'openmmlab': set(), 'onedl': set(), None: set()}
    for line in metadata.get_all('Requires-Dist'):
        need, _, condition = line.partition(';')
        extra = condition.partition('extra == ')[2].strip(' \'"') or None
        needs.setdefault(extra, set()).add(need.partition('==')[0].strip())
    hosts = ('mmcv', 'mmdet', 'mmengine', 'mmsegmentation')
    assert needs['openmmlab'] >= set(hosts)
    assert needs['onedl'] >= {
        *('onedl-mmcv', 'onedl-mmdetection', 'onedl-mmengine'),
        *('onedl-mmsegmentation', 'opencv-python'),
    }
    assert not [need for need in needs[None] if 'mm' in need]
    assert not [need for need in needs['openmmlab'] if 'onedl' in need]
    assert not needs['onedl'] & set(hosts)


def test_installed_configs_find_their_bases(wheel, tmp_path):
    wheel.extractall(tmp_path)
    configs = Path('mmagvm/.mim/configs')
    paths = [
        path
        for path in (tmp_path / configs).rglob('*.py')
        if '_base_' not in path.parts
    ]
    assert paths
    if find_spec('mmpretrain') is None:  # whose base one has
        paths = [path for path in paths if 'in22k' not in path.name]
    for path in paths:
        assert 'model' in Config.fromfile(path)
