"""AGVM, large-batch training of dense predictors, for MMEngine.

Importing this registers everything in MMEngine's root registries; neither
mmdet nor mmseg is imported.
"""

from . import optimizers  # noqa: F401  registers LARS, LAMB, PMDLAMB
from .amp_optim_wrapper import AGVMAmpOptimWrapper
from .cgbn import CGBN
from .clip_grad_hook import ClipGradWindowHook
from .compat import (
    allow_checkpoints,
    check_versions,
    find_mmseg_bases,
    keep_gradients_of_checkpointed_modules,
)
from .hook import AGVMHook
from .lr_scaling import RECIPES, RULES, LRRule, Recipe, find_rule
from .optim_wrapper import AGVMOptimWrapper
from .optim_wrapper_constructor import AGVMOptimWrapperConstructor
from .panoptic import LoadPanopticSegments
from .schedulers import ExponentialWarmupLR
from .version import __version__

check_versions()
allow_checkpoints()
find_mmseg_bases()
keep_gradients_of_checkpointed_modules()

__all__ = [
    'AGVMAmpOptimWrapper',
    'AGVMHook',
    'AGVMOptimWrapper',
    'AGVMOptimWrapperConstructor',
    'ClipGradWindowHook',
    'ExponentialWarmupLR',
    'CGBN',
    'LRRule',
    'LoadPanopticSegments',
    'RECIPES',
    'RULES',
    'Recipe',
    '__version__',
    'find_rule',
]
