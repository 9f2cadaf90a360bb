"""Of the documentation site: ``sphinx-build docs docs/_build``."""

import re
from typing import List

from sphinx.application import Sphinx

from mmagvm import __version__

project = 'mmagvm'
release = version = __version__
copyright = 'the mmagvm authors'

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
]
exclude_patterns = ['_build']
html_theme = 'furo'
html_title = 'mmagvm'

# anchors of headings as on GitHub
myst_heading_anchors = 3

autodoc_member_order = 'bysource'
autodoc_typehints = 'description'
autodoc_typehints_description_target = 'documented'
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True


def adapt(app: Sphinx, docname: str, source: List[str]) -> None:
    """Write for MyST what pages write for GitHub.

    ``<a id="name"></a>`` becomes a target. ``docs/recipes`` is a symbolic link
    to ``configs``, so that READMEs there are pages of the site. MyST would
    follow it, so links to these pages are written as Sphinx's roles.
    """
    text = re.sub(r'^<a id="([\w-]+)"></a>$', r'(\1)=', source[0], flags=re.M)
    text = re.sub(
        r'\[([^]]+)\]\(\.\./(?:configs/)?(\w+/README)\.md(?:#[^)]*)?\)',
        r'{doc}`\1 </recipes/\2>`',
        text,
    )
    source[0] = text


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect('source-read', adapt)
