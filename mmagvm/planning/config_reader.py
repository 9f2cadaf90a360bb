"""Reads the configs of mmdet and mmseg, and users' own, for these tools."""

import copy
import re
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS

from mmagvm.engine.config_types import (
    import_types,
    package_of,
    type_name,
    with_strings,
)
from mmagvm.errors import refuse
from mmagvm.recipes.lr_scaling import COCO_IMAGES, STUDY_RULES

#: Images of data sets that need not be on this machine, by class and file
#: name of ann_file or, without one, last folder of data_prefix's images: all,
#: and those with ``filter_cfg=dict(filter_empty_gt=True)``.
IMAGES = {
    ('CocoDataset', 'instances_train2017.json'): (118287, COCO_IMAGES),
    ('CocoPanopticDataset', 'panoptic_train2017.json'): (118287, COCO_IMAGES),
    ('ADE20KDataset', 'training'): (20210, 20210),
}


def load(name: str) -> Config:
    """The config that a file or a name ``package::file`` stands for."""
    if '::' not in name and not Path(name).is_file():
        refuse(f'{name}: no such config file')
    try:
        if '::' not in name:
            cfg = Config.fromfile(name)
            for key in cfg.to_dict():  # without what is merely imported
                import_types(dict.get(cfg._cfg_dict, key))
            return cfg
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / 'config.py'
            file.write_text(f'_base_ = {name!r}\n')
            return Config.fromfile(file)
    except Exception as error:
        missing = missing_module(error)
        return refuse(
            f'{name} needs {missing}, which cannot be imported: install it '
            'in a version that has it, or add its folder to PYTHONPATH'
            if missing
            else f'{name} could not be read: {one_line(error)}'
        )


def missing_module(error: BaseException) -> str:
    """The module whose absence is behind an error, '' if that is not so.

    It is the package alone where that is missing too.
    """
    cause: Optional[BaseException] = error
    while isinstance(cause, (ImportError, ConfigParsingError)):
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            package = cause.name.partition('.')[0]
            return cause.name if find_spec(package) else package
        cause = cause.__cause__ or cause.__context__
    return ''


def scope_of(cfg: Config, otherwise: str = 'mmengine') -> str:
    """Where a config's names without a package are looked up.

    Pure Python configs set no scope; theirs is the package of the model's
    class.

    Args:
        cfg: The config.
        otherwise: The scope if the config names none.
    """
    scope = cfg.get('default_scope')
    if scope is None and 'default_scope' in cfg:
        package = package_of(cfg)
        scope = package if package in MODELS.children else None
    return scope or otherwise


def plain(cfg: Config, value: Dict[str, Any]) -> Dict[str, Any]:
    """A part of a config without the scope that a ``package::`` base adds."""
    value = with_strings(value)
    if value.get('_scope_') == cfg.get('default_scope'):
        value.pop('_scope_', None)
    return value


def one_line(error: Exception) -> str:
    """An error's type and message, for the end of a sentence."""
    return f'{type(error).__name__}: {" ".join(str(error).split())}'


def find_base_batch_size(name: str, cfg: Config) -> Tuple[int, str]:
    """The batch size that a config was made for, and its source."""
    size, source = _find_batch(name, cfg)
    accumulated = cfg.optim_wrapper.get('accumulative_counts', 1)
    if accumulated > 1:
        source += f', x {accumulated} accumulated micro-batches'
    return size * accumulated, source


def _find_batch(name: str, cfg: Config) -> Tuple[int, str]:
    """The same without accumulation."""
    given = (cfg.get('auto_scale_lr') or {}).get('base_batch_size')
    images = cfg.train_dataloader.batch_size
    named = None
    for path in (*reversed(base_files(name)), name):
        rule = re.search(r'_(\d+)xb(\d+)', Path(path).name)
        if rule and int(rule[2]) == images:
            named = int(rule[1]) * images, f'the name {Path(path).name}'
    if given:
        if named and named[0] != given:
            refuse(
                f"the config's auto_scale_lr.base_batch_size is {given}, but "
                f'{named[1]} says {named[0]}: give --base-batch-size {given} '
                f'or {named[0]}, whichever its learning rate is for'
            )
        return int(given), 'its auto_scale_lr.base_batch_size'
    if named:
        return named
    return 8 * images, (
        f"8 GPUs, mmdet's default, x {images} images, as the config names no "
        'batch size; if that is wrong, give --base-batch-size'
    )


def base_files(name: str) -> List[str]:
    """The bases that a config file names itself."""
    if '::' in name:
        return []
    try:
        bases = Config._get_base_files(name)
    except Exception:  # not a text config: then its bases are imports
        return []
    return list(bases)


def innermost(dataset: Dict[str, Any]) -> Dict[str, Any]:
    """The data set inside wrappers, of several the first."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    if 'datasets' in dataset:
        return innermost(dataset['datasets'][0])
    return dataset


def training_images(cfg: Config, given: Optional[int]) -> int:
    """Images of an epoch, with repetitions; 0 where iterations are counted.

    Args:
        cfg: The config.
        given: Images of the training set, if the user says.
    """
    if not is_iteration_based(cfg.train_cfg):
        return count_images(cfg.train_dataloader.dataset, given)
    if given:
        refuse(
            f'--images {given} has no effect, since the run counts '
            'iterations: leave it out'
        )
    return 0


def count_images(dataset: Dict[str, Any], given: Optional[int] = None) -> int:
    """Images in a training set, with repetitions.

    Args:
        dataset: Its config.
        given: How many it has without repetitions; None to look them up or
            count them.
    """
    kind = type_name(dataset.get('type'))
    if kind == 'RepeatDataset':
        once = count_images(dataset['dataset'], given)
        return int(dataset['times']) * once
    if kind == 'MultiImageMixDataset':
        return count_images(dataset['dataset'], given)
    if given:
        return given
    path = dataset.get('ann_file') or (dataset.get('data_prefix') or {}).get(
        'img_path', ''
    )
    known = IMAGES.get((kind, Path(path).name))
    if known and not dataset.get('metainfo') and not dataset.get('indices'):
        filtered = (dataset.get('filter_cfg') or {}).get('filter_empty_gt')
        return known[bool(filtered)]
    try:
        return len(DATASETS.build(copy.deepcopy(dataset)))
    except Exception as error:
        return refuse(
            "the images of train_dataloader's dataset could not be counted "
            f'({one_line(error)}): write --images N'
        )


def build_model(cfg: Config) -> BaseModel:
    """The config's model, without fetching pretrained weights."""
    try:
        return MODELS.build(without_weights(cfg.model))
    except Exception as error:
        return refuse(f'the model could not be built: {one_line(error)}')


def without_weights(cfg: Any) -> Any:
    """A copy of a model's config that names no pretrained weights."""
    cfg = copy.deepcopy(cfg)
    parts = [cfg]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            part.pop('pretrained', None)
            if 'Pretrained' in str(part.get('init_cfg')):
                part['init_cfg'] = None
            parts += part.values()
        elif isinstance(part, (list, tuple)):
            parts += part
    return cfg


def is_iteration_based(train_cfg: Dict[str, Any]) -> bool:
    """Whether the length of a training is given in iterations."""
    return 'max_iters' in train_cfg


def is_adaptive(optimizer: str) -> bool:
    """Whether an optimizer is scheduled as AdamW is."""
    name = optimizer.lower()
    return 'adam' in name or 'lamb' in name or optimizer in STUDY_RULES


def recipe_of(optimizer: str, train_cfg: Dict[str, Any]) -> str:
    """Name of the nearest recipe, for warm-up, tau and clipping.

    That of Semantic FPN for trainings counted in iterations, of Faster R-CNN
    for the others; SOAP's for Muon too, which has none.
    """
    folder = 'sem_fpn' if is_iteration_based(train_cfg) else 'faster_rcnn'
    if optimizer in STUDY_RULES:
        return f'{folder}/soap'
    with_adamw = is_adaptive(optimizer) and folder == 'faster_rcnn'
    return f'{folder}/adamw' if with_adamw else folder
