"""What changes in a config that trains in shards, and what is refused."""

from typing import Any, Dict

from mmengine.config import Config
from torch import nn

from mmagvm.engine.config_types import type_name
from mmagvm.engine.fully_shard_strategy import refuse_scalars
from mmagvm.engine.shard_units import find_units
from mmagvm.errors import refuse
from mmagvm.planning.batch import Batch
from mmagvm.planning.plan import Plan

#: Settings of a Runner that a FlexibleRunner leaves to its strategy.
MOVED = ('activation_checkpointing', 'find_unused_parameters')


def plan_sharding(
    result: Plan, cfg: Config, batch: Batch, model: nn.Module
) -> None:
    """Let FullyShardStrategy train what was planned.

    Args:
        result: The plan, which changes.
        cfg: The original config.
        batch: The new batch.
        model: The config's.

    Raises:
        UsageError: The config cannot be trained in shards.
    """
    if batch.gpus < 2:
        refuse(
            '--shard: one GPU keeps the whole model: write --gpus 2 or more'
        )
    optimizer = result.diff.get('optim_wrapper', {}).get('optimizer', {})
    kind = type_name(
        optimizer.get('type') or cfg.optim_wrapper.optimizer.get('type')
    )
    if kind in ('SOAP', 'Muon'):
        refuse(
            f'--shard: {kind} needs whole matrices, and no rank holds one: '
            'leave out --shard, or write --optimizer AdamW'
        )
    for hook in cfg.get('custom_hooks') or ():
        if type_name(hook.get('type')) == 'EMAHook':
            refuse(
                '--shard: EMAHook copies the model, which is not possible in '
                'shards: remove it from custom_hooks, or leave out --shard'
            )
    try:
        refuse_scalars(model)
        units = find_units(model)
    except ValueError as error:
        refuse(f'--shard: {error}')
    strategy: Dict[str, Any] = dict(type='FullyShardStrategy')
    for name in MOVED:
        if cfg.get(name):
            strategy[name] = cfg[name]
            result.diff[name] = False if cfg[name] is True else []
            result.because(f'{name} moves into strategy')
    result.diff.update(runner_type='FlexibleRunner', strategy=strategy)
    result.because(
        f'parameters, gradients and optimizer are cut into {batch.gpus} '
        f'shards; {len(units)} units are gathered one at a time, from '
        f'{units[0]} to {units[-1]}'
    )
