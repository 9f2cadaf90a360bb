"""AGVM, large-batch training of dense predictors, for MMEngine.

Importing this registers everything in MMEngine's root registries; neither
mmdet nor mmseg is imported.
"""

from .amp_optim_wrapper import AGVMAmpOptimWrapper
from .compat import (
    allow_checkpoints,
    check_versions,
    find_mmseg_bases,
    keep_gradients_of_checkpointed_modules,
)
from .hook import AGVMHook
from .lr_scaling import RULES, LRRule, find_rule
from .optim_wrapper import AGVMOptimWrapper
from .optim_wrapper_constructor import AGVMOptimWrapperConstructor
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
    'LRRule',
    'RULES',
    '__version__',
    'find_rule',
]
