"""The pages for users build as a site, and the names in them exist."""

import ast
import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec

import pytest
from commands import ROOT

from mmagvm.core import Settings

PAGES = [
    ROOT / 'README.md',
    *sorted(ROOT.glob('docs/*.md')),
    *sorted(ROOT.glob('configs/*/README.md')),
]
MISSING = [
    name
    for name in ('sphinx', 'myst_parser', 'furo')
    if find_spec(name) is None
]


def prose(page):
    """A page's text without its blocks of code."""
    return re.sub(r'^ *```.*?^ *```', '', page.read_text(), flags=re.S | re.M)


def anchors(page):
    """The anchors of a page: GitHub's of headings, and its own."""
    found = set(re.findall(r'<a id="([\w-]+)">', page.read_text()))
    for heading in re.findall(r'^#+ +(.*?) *$', prose(page), re.M):
        words = re.sub(r'[^\w\- ]', '', heading.lower())
        found.add(words.replace(' ', '-'))
    return found


@pytest.mark.skipif(
    bool(MISSING),
    reason=f'needs pip install -e .[docs]: {MISSING} not installed',
)
def test_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q']
        + ['-b', 'html', ROOT / 'docs', tmp_path / 'site'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    page = (tmp_path / 'site/api.html').read_text()
    assert 'id="mmagvm.core.AGVM.micro_batch"' in page
    page = (tmp_path / 'site/recipes/mask_rcnn/README.html').read_text()
    assert 'href="../faster_rcnn/README.html"' in page


@pytest.mark.parametrize(
    'page', PAGES, ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_resolve(page):
    links = re.findall(r'\]\(([^)\s]+)\)', prose(page))
    broken = []
    for link in links:
        if link.startswith(('http://', 'https://')):
            continue
        path, _, anchor = link.partition('#')
        target = page.parent / path if path else page
        if not target.exists() or anchor and anchor not in anchors(target):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize(
    'page', PAGES, ids=lambda page: str(page.relative_to(ROOT))
)
def test_files_and_tests_that_are_named_exist(page):
    text = page.read_text()
    for name in re.findall(
        r'(?<![\w/.])(?:configs|docs|examples|mmagvm|tests|tools)/'
        r'[\w./-]+\.(?:jsonl|md|py|sh)\b',
        text,
    ):
        assert (ROOT / name).exists(), name
    code = ''.join(p.read_text() for p in ROOT.glob('tests/*.py'))
    for name in re.findall(r'\btest_\w+\b(?!\.py)', text):
        assert f'def {name}(' in code or (ROOT / f'tests/{name}.py').exists()


def test_settings_page_has_every_setting_with_its_default():
    rows = re.findall(
        r'^\| `(\w+)` \| ([^|]+?) \|',
        (ROOT / 'docs/settings.md').read_text(),
        re.M,
    )
    defaults = {name: value.strip('`') for name, value in rows}
    for field in fields(Settings):
        assert ast.literal_eval(defaults[field.name]) == field.default
