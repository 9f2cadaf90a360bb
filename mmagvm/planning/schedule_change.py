"""Length, warm-up and schedulers of a large-batch version."""

import math
from typing import Any, Dict, List, Optional, Tuple

from mmengine.config import Config

from mmagvm.engine.config_types import type_name
from mmagvm.planning.batch import Batch
from mmagvm.planning.config_reader import is_iteration_based, plain
from mmagvm.planning.plan import Plan, rounded
from mmagvm.recipes.lr_scaling import RECIPES, Recipe, at

#: Schedulers that can be a warm-up.
WARMUPS = (
    'LinearLR',
    'ConstantLR',
    'QuadraticWarmupLR',
    'ExponentialWarmupLR',
)
#: Numbers in a scheduler that are iterations where ``by_epoch`` is False.
SPANS = (
    *('begin', 'end', 'milestones', 'T_max', 'step_size', 'total_iters'),
    *('total_steps', 'periods'),
)
#: Numbers in a scheduler of the learning rate that are learning rates.
RATES = ('eta_min', 'eta_max', 'min_value')
#: Schedulers that lower the learning rate in every step.
GRADUAL = (
    *('PolyLR', 'CosineAnnealingLR', 'CosineRestartLR', 'LinearLR'),
    'ExponentialLR',
)
#: Updates of the shortest training in the paper: RetinaNet's at 10240.
FEWEST = RECIPES['retinanet'].iterations(10240)


def plan_schedule(
    result: Plan,
    cfg: Config,
    batch: Batch,
    recipe: Recipe,
    images: int,
) -> Tuple[int, float]:
    """Plan length, intervals and schedulers.

    Returns:
        Updates of the warm-up, and of the whole training.
    """
    schedulers = cfg.get('param_scheduler') or []
    if isinstance(schedulers, dict):
        schedulers = [schedulers]
    schedulers = [plain(cfg, scheduler) for scheduler in schedulers]
    own = find_warmup(schedulers)
    # iterations for segmentation, else epochs
    wanted = at(recipe.warmup, batch.size)
    if is_iteration_based(cfg.train_cfg):
        total = plan_iterations(result, cfg, batch)
        epoch = None
        why = "as the paper's Semantic FPN, since the run counts iterations"
    else:
        iterations = math.ceil(images / (batch.gpus * batch.images_per_gpu))
        epoch = iterations / batch.accumulation
        total = cfg.train_cfg.max_epochs * epoch
        why = f"the paper's, {wanted} epoch(s)"
        wanted = math.ceil(wanted * epoch)
        result.because(
            f'schedule kept in epochs: {cfg.train_cfg.max_epochs} of {images} '
            f'images, {iterations} iterations each'
        )
    if own is not None:
        unit = (
            epoch if schedulers[own].get('by_epoch', True) else batch.updates
        )
        before = math.ceil(schedulers[own]['end'] * (unit or 0))
        if before > wanted:
            wanted, why = before, 'as many images as in the original'
    if wanted > total / 4:
        wanted, why = max(1, int(total / 4)), 'a quarter of the training'
    result.because(f'warm-up over {wanted} updates: {why}')
    if total < FEWEST:
        result.because(
            f'only {math.ceil(total)} updates in all: the shortest training '
            f'in the paper has {FEWEST}'
        )
    old = cfg.optim_wrapper.optimizer.get('lr')
    new = result.diff['optim_wrapper']['optimizer']['lr']
    lr_times = new / old if old else None
    report_rates(result, schedulers, lr_times)
    if own is None:
        report_overlap(result, schedulers, wanted, epoch)
    result.diff['param_scheduler'] = schedule(
        schedulers, own, batch, wanted, epoch, lr_times or 1.0
    )
    return wanted, total


def report_rates(
    result: Plan, schedulers: List[Dict[str, Any]], lr_times: Optional[float]
) -> None:
    """Report what becomes of the learning rates in schedulers.

    Args:
        result: The plan, which changes.
        schedulers: The original's.
        lr_times: The new learning rate over the original's, if it names one.
    """
    for scheduler in schedulers:
        for key in rates_of(scheduler):
            what = f'{type_name(scheduler["type"])}.{key}'
            value = scheduler[key]
            result.because(
                f'{what} {value} -> {scaled_rate(value, lr_times)}, the same '
                'part of the learning rate'
                if lr_times
                else f'not changed, to be checked: {what}={value}; it is a '
                'learning rate, and the original names none'
            )


def report_overlap(
    result: Plan,
    schedulers: List[Dict[str, Any]],
    warmup: int,
    epoch: Optional[float],
) -> None:
    """Report schedulers that decay during a warm-up that is new.

    Args:
        result: The plan, which changes.
        schedulers: The original's.
        warmup: Updates of the warm-up.
        epoch: Updates in an epoch, for runs that count in epochs.
    """
    for scheduler in schedulers:
        name = type_name(scheduler['type'])
        in_steps = not scheduler.get('by_epoch', True) or scheduler.get(
            'convert_to_iter_based'
        )
        if (
            name in GRADUAL
            and not scheduler.get('begin')
            and (in_steps or warmup > math.ceil(epoch or 0))
        ):
            result.because(
                f'{name} already decays during the warm-up, which the '
                'original does not have: the learning rate stays below its '
                'value'
            )


def rates_of(scheduler: Dict[str, Any]) -> List[str]:
    """Keys of a scheduler whose values are learning rates, not 0."""
    if not type_name(scheduler['type']).endswith('LR'):
        return []  # of the momentum or another parameter
    return [key for key in RATES if scheduler.get(key)]


def find_warmup(schedulers: List[Dict[str, Any]]) -> Optional[int]:
    """Index of the scheduler that is a warm-up, if there is one."""
    for index, scheduler in enumerate(schedulers):
        grows = scheduler.get('start_factor', 0) < scheduler.get(
            'end_factor', 1
        )
        if (
            type_name(scheduler['type']) in WARMUPS
            and scheduler.get('begin', 0) == 0
            and 'end' in scheduler
            and grows
        ):
            return index
    return None


def plan_iterations(result: Plan, cfg: Config, batch: Batch) -> int:
    """Plan length and intervals of an iteration-based run.

    Returns:
        Updates of the whole training.
    """
    scaled = batch.iterations
    old = cfg.train_cfg
    length = scaled(old.max_iters)
    new: Dict[str, Any] = dict(max_iters=length)
    if old.get('val_interval'):
        new['val_interval'] = scaled(old.val_interval)
        if old.val_interval > old.max_iters:  # never
            new['val_interval'] = length + 1
    if old.get('val_begin'):
        new['val_begin'] = scaled(old.val_begin)
    if old.get('dynamic_intervals'):
        new['dynamic_intervals'] = [
            (scaled(start), scaled(interval))
            for start, interval in old.dynamic_intervals
        ]
    result.diff['train_cfg'] = new
    checkpoint = cfg.get('default_hooks', {}).get('checkpoint') or {}
    if checkpoint.get('by_epoch') is False and checkpoint.get('interval'):
        result.diff['default_hooks'] = dict(
            checkpoint={
                key: scaled(checkpoint[key])
                for key in ('interval', 'save_begin')
                if checkpoint.get(key)
            }
        )
    result.because(
        f'{old.max_iters} -> {length} iterations, for the same number of '
        'images; other settings in iterations change by the same factor'
    )
    return length // batch.accumulation


def schedule(
    schedulers: List[Dict[str, Any]],
    own: Optional[int],
    batch: Batch,
    warmup: int,
    epoch: Optional[float],
    lr_times: float = 1.0,
) -> List[Dict[str, Any]]:
    """The schedulers, with another warm-up and scaled iterations.

    Args:
        schedulers: The original's.
        own: Which of them is the warm-up.
        batch: The new batch.
        warmup: Updates of the new warm-up.
        epoch: Updates in an epoch, for runs that count in epochs.
        lr_times: The new learning rate over the original's.
    """
    end = warmup * batch.accumulation  # schedulers count iterations
    result = []
    for index, old in enumerate(schedulers):
        new = dict(old)
        for key in rates_of(old):
            new[key] = scaled_rate(old[key], lr_times)
        by_epoch = old.get('by_epoch', True)
        if not by_epoch:
            for key in set(SPANS) & set(old):
                new[key] = scaled(old[key], batch)
            if type_name(old['type']).startswith('Exponential') and (
                'gamma' in old  # the factor of each iteration
            ):
                new['gamma'] = float(f'{old["gamma"] ** batch.times:.6g}')
        if index == own:
            new.update(by_epoch=False, begin=0, end=end)
            new.pop('convert_to_iter_based', None)
            new.pop('total_iters', None)
        elif own is not None and follows(old, schedulers[own]):
            # what followed the old warm-up follows the new one
            start = new.get('begin', 0)
            # a warm-up is rounded up to whole updates, not to another epoch
            new['begin'] = (
                math.ceil(round(warmup / (epoch or 1), 2)) if by_epoch else end
            )
            if 'T_max' in new:
                new['T_max'] += start - new['begin']
        result.append(new)
    if own is None:
        result.insert(
            0,
            dict(
                type='LinearLR',
                start_factor=0.001,
                by_epoch=False,
                begin=0,
                end=end,
            ),
        )
    return result


def follows(scheduler: Dict[str, Any], warmup: Dict[str, Any]) -> bool:
    """Whether a scheduler begins where the warm-up ends."""
    same_unit = scheduler.get('by_epoch', True) == warmup.get('by_epoch', True)
    return same_unit and bool(scheduler.get('begin', 0) == warmup['end'])


def scaled_rate(value: Any, times: float) -> Any:
    """A learning rate, or a list of them, in proportion to another."""
    if isinstance(value, (list, tuple)):
        return [scaled_rate(item, times) for item in value]
    return rounded(value * times)


def scaled(value: Any, batch: Batch) -> Any:
    """Iterations, or lists of them, of the new batch."""
    if isinstance(value, (list, tuple)):
        return [scaled(item, batch) for item in value]
    if value is None or math.isinf(value):
        return value
    return batch.iterations(value)
