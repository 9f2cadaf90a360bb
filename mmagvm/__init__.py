"""AGVM, large-batch training of dense predictors.

Where MMEngine is installed, importing this registers everything in its root
registries; neither mmdet nor mmseg is imported. ``mmagvm.core`` is AGVM for
any training loop, and the only part that works without MMEngine.
"""

from importlib.util import find_spec
from typing import Any

from mmagvm.version import __version__

if find_spec('mmengine') is not None:
    from mmagvm.engine import (
        AGVMAmpOptimWrapper,
        AGVMHook,
        AGVMOptimWrapper,
        AGVMOptimWrapperConstructor,
        FullyShardStrategy,
    )
    from mmagvm.recipes import (
        CGBN,
        RECIPES,
        RULES,
        ClipGradWindowHook,
        ExponentialWarmupLR,
        LoadPanopticSegments,
        LRRule,
        Recipe,
        find_rule,
    )
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(
                f'mmagvm.{name} needs MMEngine, which comes with OpenMMLab or '
                "with its onedl fork: pip install 'mmagvm[openmmlab]' or "
                "'mmagvm[onedl]'"
            )
        raise AttributeError(f'module mmagvm has no attribute {name!r}')


__all__ = [
    'AGVMAmpOptimWrapper',
    'AGVMHook',
    'AGVMOptimWrapper',
    'AGVMOptimWrapperConstructor',
    'CGBN',
    'ClipGradWindowHook',
    'ExponentialWarmupLR',
    'FullyShardStrategy',
    'LRRule',
    'LoadPanopticSegments',
    'RECIPES',
    'RULES',
    'Recipe',
    '__version__',
    'find_rule',
]
