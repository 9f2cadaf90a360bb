"""Packaging of mmagvm."""

import shutil
from pathlib import Path
from typing import List

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def requirements(name: str) -> List[str]:
    """The lines of requirements/``name``.txt that are not comments."""
    lines = (HERE / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


class BuildWithMim(build_py):
    """Adds configs and tools where packages of OpenMMLab have them."""

    #: What `mim` finds under .mim; the index comes with the recipes.
    CONTENT = ('configs', 'tools', 'model-index.yml')

    def run(self) -> None:
        """Build the package, then copy them into it."""
        super().run()
        if self.editable_mode:  # they are used where they lie
            return
        mim = Path(self.build_lib) / 'mmagvm' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)  # of an earlier build
        mim.mkdir(parents=True)
        for name in self.CONTENT:
            if (HERE / name).is_dir():
                ignore = shutil.ignore_patterns('__pycache__', '*.pyc')
                shutil.copytree(HERE / name, mim / name, ignore=ignore)
            elif (HERE / name).exists():
                shutil.copy(HERE / name, mim)


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
    cmdclass={'build_py': BuildWithMim},
    python_requires='>=3.9',
    install_requires=requirements('runtime'),
    extras_require={
        'openmmlab': requirements('openmmlab'),
        'optimizers': requirements('optimizers'),
        'onedl': requirements('onedl'),
        'tools': requirements('tools'),
        'tests': requirements('tests'),
    },
)
