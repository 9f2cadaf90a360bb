"""The text of the metafiles, with which `mim` and others find configs."""

from typing import Dict, Iterable, NamedTuple

from mmagvm.recipes.writing.config_file import ConfigFile


class Paper(NamedTuple):
    """The source of recipes."""

    title: str
    url: str


class Collection(NamedTuple):
    """What a folder's configs have in common."""

    name: str
    paper: Paper
    data: str = 'COCO'


AGVM = Paper(
    'Large-batch Optimization for Dense Visual Predictions',
    'https://arxiv.org/abs/2210.11078',
)
MEGDET = Paper(
    'MegDet: A Large Mini-Batch Object Detector',
    'https://arxiv.org/abs/1711.07240',
)
#: By folder.
COLLECTIONS: Dict[str, Collection] = {
    'ablations': Collection('AGVM: gradient variance misalignment', AGVM),
    'faster_rcnn': Collection('AGVM: Faster R-CNN', AGVM),
    'mask_rcnn': Collection('AGVM: Mask R-CNN', AGVM),
    'megdet': Collection('MegDet', MEGDET),
    'panoptic_fpn': Collection('AGVM: Panoptic FPN', AGVM),
    'retinanet': Collection('AGVM: RetinaNet', AGVM),
    'sem_fpn': Collection('AGVM: Semantic FPN', AGVM, 'ADE20K'),
}


def metafile(folder: str, configs: Iterable[ConfigFile]) -> str:
    """A folder's ``metafile.yml``."""
    collection = COLLECTIONS[folder]
    models = ''.join(_model(collection, config) for config in configs)
    return f"""\
Collections:
  - Name: '{collection.name}'
    Metadata:
      Training Data: {collection.data}
    Paper:
      Title: '{collection.paper.title}'
      URL: {collection.paper.url}
    README: configs/{folder}/README.md

Models:
{models}"""


def _model(collection: Collection, config: ConfigFile) -> str:
    length = f'Epochs: {config.recipe.epochs}'
    if config.recipe.epochs is None:
        length = f'Iterations: {config.iterations}'
    # results are listed once there is a log of them
    return f"""\
  - Name: {config.name}
    In Collection: '{collection.name}'
    Config: {config.path}
    Metadata:
      Batch Size: {config.batch_size}
      {length}
"""


def model_index() -> str:
    """The project's ``model-index.yml``."""
    files = [f'  - configs/{folder}/metafile.yml' for folder in COLLECTIONS]
    return '\n'.join(('Import:', *files, ''))
