"""What follows from the recipes' numbers: configs, metafiles, README tables.

``tools/misc/write_configs.py`` writes them. The bases in the folders'
``_base_``, and all other text of the READMEs, are written by hand.
"""

from pathlib import Path
from typing import Dict, List

from mmagvm.markdown import filled
from mmagvm.recipes.writing.configs import CONFIGS
from mmagvm.recipes.writing.metafiles import (
    COLLECTIONS,
    metafile,
    model_index,
)
from mmagvm.recipes.writing.tables import tables

__all__ = ['left_over', 'texts']


def texts(root: Path) -> Dict[Path, str]:
    """The text of each file, by its path.

    Args:
        root: Of the project, for the READMEs' text around their tables.
    """
    result = {root / config.path: config.write(config) for config in CONFIGS}
    result[root / 'model-index.yml'] = model_index()
    for folder in COLLECTIONS:
        configs = [config for config in CONFIGS if config.folder == folder]
        path = root / 'configs' / folder
        result[path / 'metafile.yml'] = metafile(folder, configs)
        page = (path / 'README.md').read_text()
        for name, table in tables(folder, configs).items():
            page = filled(page, f'recipes {name}', table)
        result[path / 'README.md'] = page
    return result


def left_over(root: Path) -> List[Path]:
    """Config files in the recipes' folders that belong to no recipe."""
    paths = {root / config.path for config in CONFIGS}
    return [
        path
        for folder in COLLECTIONS
        for path in sorted((root / 'configs' / folder).glob('*.py'))
        if path not in paths
    ]
