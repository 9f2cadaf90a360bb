"""Selects the estimator that fits how a model is trained."""

from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmagvm.core.wrapped import (
    called_by,
    modules_in,
    optimizers_in,
    uncompiled,
)

from .base import GradVariance
from .pairs import PairsMicroBatches, PairsRanks
from .parts import is_sharded
from .shards import PairsShards, SplitShards
from .split import SplitMicroBatches, SplitRanks

#: Classes by name: over ranks, over one rank's micro-batches, and over shards.
ESTIMATORS: Dict[str, Tuple[Callable[..., GradVariance], ...]] = {
    'split': (SplitRanks, SplitMicroBatches, SplitShards),
    'pairs': (PairsRanks, PairsMicroBatches, PairsShards),
}
#: Advice where parameters are sharded in another way.
FULLY_SHARD = (
    "to train in shards, set runner_type='FlexibleRunner' and "
    "strategy=dict(type='FullyShardStrategy'), without MMEngine call torch's "
    'fully_shard; else train with MMDistributedDataParallel'
)
#: Names of model wrappers that keep gradients in shards of their own.
SHARDED = (
    'DeepSpeedEngine',
    'MMDeepSpeedEngineWrapper',
    'FullyShardedDataParallel',
    'ColossalAIModelWrapper',
    'CollosalAIModelWrapper',
)
#: torch's modules of communication hooks that do not return the mean of the
#: ranks' gradients.
INEXACT_HOOKS = ('powerSGD_hook', 'post_localSGD_hook', 'debugging_hooks')


def build_grad_variance(
    estimator: str,
    optimizer: torch.optim.Optimizer,
    modules: Sequence[int],
    model: nn.Module,
    accumulative_counts: int,
    comm_hook: Optional[str] = None,
) -> GradVariance:
    """The estimator for ``model``.

    Args:
        estimator: A key of ``ESTIMATORS``.
        optimizer: Of all trainable parameters.
        modules: Index of each parameter group's module, 0 to h - 1.
        model: As training calls it, in its data-parallel wrapper if any.
        accumulative_counts: Micro-batches in an update.
        comm_hook: As in :class:`RankVariance`.

    Raises:
        ValueError: AGVM cannot measure in this setting; the message says what
            to change.
    """
    refuse_sharded_model(model)
    model = uncompiled(model)
    refuse_sharded_state(optimizer)
    _refuse_sparse_gradients(model)
    over_ranks, over_micro_batches, over_shards = ESTIMATORS[estimator]
    if any(is_sharded(p) for g in optimizer.param_groups for p in g['params']):
        if comm_hook is not None:
            raise ValueError(
                f'comm_hook={comm_hook!r} in optim_wrapper needs '
                'DistributedDataParallel, but parameters are sharded: leave '
                'it out, and set the type in which gradients are sent by '
                'mixed_precision.reduce_dtype of FullyShardStrategy'
            )
        return over_shards(optimizer, modules, model, accumulative_counts)
    # MMSeparateDistributedDataParallel is one by name only
    if isinstance(model, DistributedDataParallel) and hasattr(
        model, 'process_group'
    ):
        if dist.get_world_size(model.process_group) > 1:
            _refuse_inexact_means(model)
            return over_ranks(optimizer, modules, model, comm_hook)
    elif dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f'AGVM measures in the gradient reduction of DistributedData'
            f'Parallel, but with {dist.get_world_size()} ranks the model is '
            f'a {type(model).__name__}: train with MMDistributedDataParallel, '
            'or without MMEngine with DistributedDataParallel'
        )
    if accumulative_counts < 2:
        raise ValueError(
            'AGVM compares parts of the batch, and one rank with '
            f'accumulative_counts={accumulative_counts} has only one part: '
            'train on 2 or more ranks, or set accumulative_counts=2 or more '
            'in optim_wrapper, without MMEngine AGVM(..., accumulation=2)'
        )
    return over_micro_batches(optimizer, modules, accumulative_counts)


def refuse_sharded_model(model: nn.Module) -> None:
    """Raise a ValueError if the model, or a part of it, is kept in shards.

    A part without trainable parameters, such as a teacher, may be.
    """
    for part in modules_in(model):
        names = {cls.__name__ for cls in type(part).__mro__}
        for name in SHARDED:
            if name in names and (
                part is model
                or any(p.requires_grad for p in part.parameters())
            ):
                raise ValueError(
                    f'AGVM does not support {name}, which keeps gradients and '
                    f'optimizer in shards of its own: {FULLY_SHARD}'
                )


def _refuse_inexact_means(model: DistributedDataParallel) -> None:
    """Refuse a model with gradients that are not the mean over the ranks."""
    for hook, state in getattr(model, '_comm_hooks', ()):
        # a hook may call another one, with the state of that one
        for part in (*called_by(hook), type(state)):
            module = str(getattr(part, '__module__', ''))
            if module.rpartition('.')[2] in INEXACT_HOOKS:
                raise ValueError(
                    'AGVM compares local gradients with their mean, but the '
                    f'communication hook {_name(part)} does not return the '
                    "mean: leave it out, or set comm_hook='fp16' or 'bf16' in "
                    'optim_wrapper instead'
                )
    ignored = sorted(
        name
        for name, param in model.module.named_parameters()
        if param.requires_grad and name in model.parameters_to_ignore
    )
    if ignored:
        raise ValueError(
            f'the model makes DistributedDataParallel ignore {ignored[0]}, so '
            'its gradient, and with it lr_scale, would differ between ranks: '
            'freeze it (requires_grad=False), or let it be averaged'
        )


def _refuse_sparse_gradients(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if (
            isinstance(layer, (nn.Embedding, nn.EmbeddingBag))
            and layer.sparse
            and layer.weight.requires_grad
        ):
            raise ValueError(
                f'AGVM does not support sparse gradients: set sparse=False in '
                f'the {type(layer).__name__} {name}'
            )


def _name(function: Any) -> str:
    return str(getattr(function, '__name__', type(function).__name__))


def refuse_sparse_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError if a gradient is sparse."""
    for group in optimizer.param_groups:
        for i, param in enumerate(group['params']):
            if param.grad is not None and param.grad.is_sparse:
                names = group.get('param_names')
                raise ValueError(
                    'AGVM does not support sparse gradients, which '
                    f'{names[i] if names else "a parameter"} has: set '
                    'sparse=False where it is used'
                )


def refuse_sharded_state(optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError if only the optimizer's state is sharded."""
    optimizers = {
        cls.__name__
        for inner in optimizers_in(optimizer)
        for cls in type(inner).__mro__
    }
    if 'ZeroRedundancyOptimizer' in optimizers:
        raise ValueError(
            'AGVM does not support ZeroRedundancyOptimizer: its state is '
            'spread over the ranks, and MMEngine hangs when it saves the '
            'state, as only one rank gathers it. Instead set optimizer.type '
            "in optim_wrapper to the optimizer itself, such as 'AdamW', and "
            f'{FULLY_SHARD}'
        )
