"""AGVM in MMEngine: optimizer wrappers, their constructor and the hook.

Importing this makes the repairs that are needed before a config is read: see
``host``.
"""

from mmagvm.engine.amp_optim_wrapper import AGVMAmpOptimWrapper
from mmagvm.engine.fully_shard_strategy import FullyShardStrategy
from mmagvm.engine.hook import AGVMHook
from mmagvm.engine.host import check_versions, repair_at_import
from mmagvm.engine.log import forward_messages
from mmagvm.engine.optim_wrapper import AGVMOptimWrapper
from mmagvm.engine.optim_wrapper_constructor import AGVMOptimWrapperConstructor

check_versions()
repair_at_import()
forward_messages()

__all__ = [
    'AGVMAmpOptimWrapper',
    'AGVMHook',
    'AGVMOptimWrapper',
    'AGVMOptimWrapperConstructor',
    'FullyShardStrategy',
]
