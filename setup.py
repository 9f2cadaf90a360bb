"""Packaging of mmagvm."""

from pathlib import Path
from typing import List

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def requirements(name: str) -> List[str]:
    """The lines of requirements/``name``.txt that are not comments."""
    lines = (HERE / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


version: dict = {}
exec((HERE / 'mmagvm' / 'version.py').read_text(), version)

setup(
    name='mmagvm',
    version=version['__version__'],
    description='AGVM, large-batch training of detectors and segmenters, for '
    'MMEngine, MMDetection and MMSegmentation',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmagvm*']),
    python_requires='>=3.9',
    install_requires=requirements('runtime'),
    extras_require={
        'openmmlab': requirements('openmmlab'),
        'onedl': requirements('onedl'),
        'tools': requirements('tools'),
        'tests': requirements('tests'),
    },
)
