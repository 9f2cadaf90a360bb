"""The version, read by pyproject.toml too, and the commit."""

import subprocess
from pathlib import Path

__version__ = '0.1.0'


def full_version() -> str:
    """The version, and in a git checkout the commit: '0.1.0+g1a2b3c4'.

    It ends in '-dirty' if tracked files differ from that commit.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / '.git').exists():  # git would find a project around it
        return __version__
    describe = ['git', 'describe', '--always', '--dirty', '--exclude=*']
    try:
        done = subprocess.run(
            describe, cwd=root, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return __version__
    commit = done.stdout.strip()
    return f'{__version__}+g{commit}' if commit else __version__
