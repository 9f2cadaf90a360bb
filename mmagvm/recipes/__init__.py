"""The papers' numbers, and classes of their recipes that OpenMMLab lacks.

Importing this registers the classes.
"""

from mmagvm.recipes import optimizers  # noqa: F401  registers them
from mmagvm.recipes.cgbn import CGBN
from mmagvm.recipes.clip_grad_hook import ClipGradWindowHook
from mmagvm.recipes.lr_scaling import (
    RECIPES,
    RULES,
    LRRule,
    Recipe,
    find_rule,
)
from mmagvm.recipes.panoptic import LoadPanopticSegments
from mmagvm.recipes.schedulers import ExponentialWarmupLR

__all__ = [
    'CGBN',
    'ClipGradWindowHook',
    'ExponentialWarmupLR',
    'LRRule',
    'LoadPanopticSegments',
    'RECIPES',
    'RULES',
    'Recipe',
    'find_rule',
]
