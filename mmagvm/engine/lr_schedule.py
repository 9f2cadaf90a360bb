"""Fits a run's schedulers to its groups, and finds the warm-up."""

import math
from typing import Sequence

from mmengine.optim import _ParamScheduler

from mmagvm.engine.optim_wrapper import AGVMOptimWrapper


def fit_schedulers(
    wrapper: AGVMOptimWrapper, schedulers: Sequence[_ParamScheduler]
) -> None:
    """Give schedulers the values of the groups of this run.

    A checkpoint with other groups leaves them with one value for each of
    those. MMEngine's cosine schedulers and ReduceOnPlateauLR then ignore any
    further groups.
    """
    count = len(wrapper.param_groups)
    for scheduler in schedulers:
        initial = f'initial_{scheduler.param_name}'
        scheduler.base_values = [
            group.get(initial, group.get(scheduler.param_name))
            for group in wrapper.param_groups
        ]
        limits = getattr(scheduler, 'min_values', None)  # ReduceOnPlateauLR's
        if limits is not None and len(limits) != count:
            scheduler.min_values = limits[-1:] * count


def warmup_updates(
    schedulers: Sequence[_ParamScheduler],
    epoch_length: int,
    max_iters: int,
    accumulative_counts: int,
) -> int:
    """The number of updates in which the learning rate grows at the start.

    Args:
        schedulers: The built schedulers of a run.
        epoch_length: Iterations of an epoch.
        max_iters: Iterations of the run. A rise over the whole run is not a
            warm-up.
        accumulative_counts: Iterations of an update.

    Returns:
        0 if there is no warm-up.
    """
    ends = [
        warmup_end(scheduler) * (epoch_length if scheduler.by_epoch else 1)
        for scheduler in schedulers
        if scheduler.param_name == 'lr' and scheduler.begin == 0
    ]
    iterations = max((end for end in ends if end < max_iters), default=0)
    return math.ceil(iterations / accumulative_counts)


def warmup_end(scheduler: _ParamScheduler) -> float:
    """The step at which a scheduler stops raising the rate; 0 if none."""
    if (
        # of LinearLR and ExponentialWarmupLR, and of ConstantLR
        getattr(scheduler, 'start_factor', 1)
        < getattr(scheduler, 'end_factor', 1)
        or getattr(scheduler, 'factor', 1) < 1
        or 'Warmup' in type(scheduler).__name__
    ):
        return float(scheduler.end)
    phases = getattr(scheduler, '_schedule_phases', None)  # OneCycleLR's
    return float(phases[0]['end_step']) if phases else 0.0
