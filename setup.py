"""What pyproject.toml cannot say: configs and tools go into the wheel."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildWithMim(build_py):
    """Adds configs and tools where packages of OpenMMLab have them."""

    #: What `mim` finds under .mim; the index comes with the recipes.
    CONTENT = ('configs', 'tools', 'model-index.yml')
    #: Of developers: packages of their own, and the results of the study.
    LEFT_OUT = (
        *('__pycache__', '*.pyc', '*.egg-info'),
        *('benchmarks', 'study', 'pyproject.toml'),
    )

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
                ignore = shutil.ignore_patterns(*self.LEFT_OUT)
                shutil.copytree(HERE / name, mim / name, ignore=ignore)
            elif (HERE / name).exists():
                shutil.copy(HERE / name, mim)


setup(cmdclass={'build_py': BuildWithMim})
