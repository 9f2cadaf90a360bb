"""What changes in a config of mmdet or mmseg for a larger batch with AGVM."""

import math
from typing import Optional, Tuple

from mmengine.config import Config

from mmagvm.engine.config_types import type_name, type_path
from mmagvm.errors import refuse
from mmagvm.planning.batch import Batch
from mmagvm.planning.config_reader import (
    is_iteration_based,
    plain,
    recipe_of,
)
from mmagvm.planning.counts import convert_average, unchanged
from mmagvm.planning.optimizer_change import plan_clipping, plan_optimizer
from mmagvm.planning.plan import Plan
from mmagvm.planning.schedule_change import plan_schedule
from mmagvm.recipes.lr_scaling import (
    CLIP_MARGIN,
    MEASURING_DELAY,
    RECIPES,
    Recipe,
    at,
)

#: Optimizer wrappers and the AGVM one that does the same.
WRAPPERS = dict(
    OptimWrapper='AGVMOptimWrapper',
    AmpOptimWrapper='AGVMAmpOptimWrapper',
    AGVMOptimWrapper='AGVMOptimWrapper',
    AGVMAmpOptimWrapper='AGVMAmpOptimWrapper',
)
CONSTRUCTORS = (
    '',
    'DefaultOptimWrapperConstructor',
    'AGVMOptimWrapperConstructor',
)
#: MMEngine's default interval of LoggerHook, in iterations.
LOGGED = 10


def plan_training(
    result: Plan,
    cfg: Config,
    batch: Batch,
    wanted: Optional[str],
    dataset: str,
    images: int,
    agvm: bool = True,
) -> Tuple[int, float]:
    """Plan optimizer, schedule and AGVM.

    Args:
        result: The plan, which changes.
        cfg: The original.
        batch: The new batch.
        wanted: An optimizer to change to.
        dataset: Type of the data set, which chooses the learning-rate rule.
        images: Of an epoch; unused where iterations are counted.
        agvm: Whether AGVM trains.

    Returns:
        Updates of the warm-up, and of the whole training.
    """
    plan_optimizer(result, cfg, batch, wanted, dataset)
    plan_clipping(result, cfg, batch, wanted)
    optimizer = wanted or type_name(cfg.optim_wrapper.optimizer['type'])
    recipe = RECIPES[recipe_of(optimizer, cfg.train_cfg)]
    warmup, total = plan_schedule(result, cfg, batch, recipe, images)
    result.diff['optim_wrapper']['accumulative_counts'] = batch.accumulation
    if agvm:
        plan_agvm(result, cfg, batch, warmup, total, recipe)
    plan_hooks(result, cfg, batch, warmup, agvm)
    plan_imports(result, cfg)
    report_unchanged(result, cfg, batch, total)
    return warmup, total


def report_unchanged(
    result: Plan, cfg: Config, batch: Batch, total: float
) -> None:
    """Report the numbers that count and do not change."""
    by_epoch = not is_iteration_based(cfg.train_cfg)
    iterations, epochs = unchanged(cfg, result.diff, by_epoch)
    if batch.times == 1:  # then only the images of a GPU may differ
        iterations = [count for count in iterations if '.batch_size=' in count]
    if iterations:
        new = math.ceil(total * batch.accumulation)
        result.because(
            f'not changed, to be checked: {", ".join(iterations)}; they count '
            f'iterations or images. The new run has {new} iterations, each '
            f'with {batch.size // batch.accumulation} images, '
            f"{batch.times:.3g} times the original's"
        )
    if epochs and by_epoch:
        result.because(
            f'not changed, as the number of epochs stays: {", ".join(epochs)}'
        )
    elif epochs:
        result.because(
            f'not changed, to be checked: {", ".join(epochs)}; they count '
            'epochs, but the run ends by iterations'
        )


def check(cfg: Config) -> None:
    """Refuse configs that AGVM or this tool does not support."""
    for key in ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'):
        if not cfg.get(key):
            refuse(
                f'the config has no {key}: give one that trains a model of '
                'mmdet or mmseg'
            )
    wrapper = cfg.optim_wrapper
    if 'optimizer' not in wrapper:
        several = [k for k, v in wrapper.items() if isinstance(v, dict)]
        if not several:
            refuse(
                'optim_wrapper has no optimizer: write '
                "optimizer=dict(type='SGD', lr=...)"
            )
        refuse(
            f'optim_wrapper has several, {several}, but AGVM modulates one '
            'optimizer of the whole model: write a single optim_wrapper'
        )
    optimizer = wrapper.optimizer
    if not isinstance(optimizer, dict) or not optimizer.get('type'):
        refuse(
            'optim_wrapper.optimizer has no type, but AGVM modulates one '
            "optimizer of the whole model: write optimizer=dict(type='SGD', "
            '...)'
        )
    if not isinstance(cfg.train_dataloader.get('dataset'), dict):
        refuse(
            'train_dataloader.dataset is not the config of one data set: '
            'write dataset=dict(type=...)'
        )
    if not isinstance(cfg.train_dataloader.get('batch_size'), int):
        refuse('train_dataloader has no batch_size: write the images per GPU')
    if not cfg.train_cfg.get('max_epochs') and not cfg.train_cfg.get(
        'max_iters'
    ):
        refuse(
            'train_cfg has neither max_epochs nor max_iters: write the length '
            'of the training'
        )
    kind = type_name(wrapper.get('type', 'OptimWrapper'))
    if kind not in WRAPPERS:
        refuse(
            f'optim_wrapper.type={kind!r} has no AGVM counterpart: write '
            "'OptimWrapper' or 'AmpOptimWrapper' in the original"
        )


def plan_agvm(
    result: Plan,
    cfg: Config,
    batch: Batch,
    warmup: int,
    total: float,
    recipe: Recipe,
) -> None:
    """AGVM's own settings."""
    interval = at(recipe.interval, batch.size)
    delay = MEASURING_DELAY
    if not is_iteration_based(cfg.train_cfg):  # as Recipe.begin
        delay = min(delay, math.ceil(total / cfg.train_cfg.max_epochs))
    if warmup + delay > total / 2:  # too few updates are left to modulate
        delay = 0
    result.diff['optim_wrapper'].update(
        type=WRAPPERS[
            type_name(cfg.optim_wrapper.get('type', 'OptimWrapper'))
        ],
        constructor='AGVMOptimWrapperConstructor',
        interval=interval,
        ema_decay=0.97,
        begin=warmup + delay,
    )
    constructor = cfg.optim_wrapper.get('constructor')
    if type_name(constructor) not in CONSTRUCTORS:
        constructor = type_path(constructor)
        result.diff['optim_wrapper']['base_constructor'] = constructor
        result.because(
            f'{constructor} still sets the options of parameters; AGVM groups '
            'them by module'
        )
    result.because(
        f'AGVM measures every {interval} updates (tau), first in update '
        f'{warmup + delay} of {math.ceil(total)}, {delay} after warm-up'
    )
    logger = cfg.get('default_hooks', {}).get('logger') or {}
    measured = interval * batch.accumulation
    if logger.get('interval', LOGGED) > measured:
        result.diff.setdefault('default_hooks', {})['logger'] = dict(
            interval=measured
        )
        result.because(
            f'the log has a line every {measured} iterations, so that it '
            'contains each measurement'
        )


def plan_imports(result: Plan, cfg: Config) -> None:
    """Import mmagvm, which registers AGVM and optimizers."""
    imports = (cfg.get('custom_imports') or {}).get('imports', [])
    imports = [imports] if isinstance(imports, str) else list(imports)
    if 'mmagvm' not in imports:
        result.diff['custom_imports'] = dict(
            imports=[*imports, 'mmagvm'], allow_failed_imports=False
        )


def plan_hooks(
    result: Plan, cfg: Config, batch: Batch, warmup: int, agvm: bool
) -> None:
    """AGVM's hook, and clipping around the end of warm-up."""
    old = [plain(cfg, hook) for hook in cfg.get('custom_hooks') or []]
    hooks = [dict(hook) for hook in old]
    for hook in hooks:
        converted = convert_average(hook, batch.times)
        if converted is not None:
            hook.update(converted[0])
            result.because(converted[1])
        if type_name(hook['type']) == 'ClipGradWindowHook':
            begin, end = max(0, warmup - CLIP_MARGIN), warmup + CLIP_MARGIN
            hook.update(
                begin=begin * batch.accumulation, end=end * batch.accumulation
            )
            result.because(
                f'ClipGradWindowHook clips updates {begin} to {end}, around '
                'the end of the warm-up, as in the official code'
            )
    if agvm and 'AGVMHook' not in [type_name(hook['type']) for hook in hooks]:
        hooks.append(dict(type='AGVMHook'))
    if hooks != old:
        result.diff['custom_hooks'] = hooks
