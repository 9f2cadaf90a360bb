"""What changes in a config of mmdet or mmseg for a larger batch with AGVM."""

import math
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

from mmengine.config import Config

from mmagvm.engine.config_types import type_name, type_path, with_strings
from mmagvm.errors import refuse
from mmagvm.planning.config_reader import (
    count_images,
    is_adaptive,
    is_iteration_based,
    recipe_of,
)
from mmagvm.planning.counts import convert_average, unchanged
from mmagvm.recipes.lr_scaling import (
    CLIP_MARGIN,
    MEASURING_DELAY,
    RECIPES,
    RULES,
    SOAP_OPTIONS,
    STUDY_RULES,
    LRRule,
    Recipe,
    at,
    find_rule,
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
#: Optimizers to change to: the optimizer with the rule for their learning
#: rate, unless they have their own, and their options. The paper has a rate
#: for SGD and AdamW only; this project's study has one for SOAP and Muon.
OPTIONS: Dict[str, Tuple[str, Dict[str, Any]]] = {
    'SGD': ('SGD', dict(momentum=0.9, weight_decay=1e-4)),
    'LARS': (
        'SGD',
        dict(momentum=0.9, weight_decay=1e-4, trust_coefficient=0.02),
    ),
    'AdamW': ('AdamW', dict(weight_decay=0.05)),
    'LAMB': ('AdamW', dict(weight_decay=0.05)),
    'PMDLAMB': ('AdamW', dict(weight_decay=0.05)),
    'SOAP': ('AdamW', SOAP_OPTIONS),
    'Muon': ('AdamW', dict(weight_decay=0.05)),
}
#: Source of the rates of SOAP and Muon.
BY_STUDY = (
    "this project's rule, by its study of small detectors; not in the paper, "
    'not tested on COCO: also try half and twice this rate'
)
#: Of LAMB and PMD-LAMB: a guess, the same as in the recipes.
LAMB_RULE = RECIPES['faster_rcnn/lamb'].rule
#: MMEngine's default interval of LoggerHook, in iterations.
LOGGED = 10
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


@dataclass
class Plan:
    """The difference to the original, and why."""

    diff: Dict[str, Any] = field(default_factory=dict)
    reasons: List[str] = field(default_factory=list)

    def because(self, reason: str) -> None:
        self.reasons.append(reason)


@dataclass(frozen=True)
class Batch:
    """How a batch is made, and how much larger it is than the original's."""

    size: int
    gpus: int
    images_per_gpu: int
    accumulation: int
    base: int
    base_accumulation: int = 1

    @property
    def updates(self) -> float:
        """Updates that see as many images as an old iteration."""
        return self.base / self.base_accumulation / self.size

    @property
    def times(self) -> float:
        """Images of an iteration, over those of an old one."""
        return 1 / (self.accumulation * self.updates)

    def iterations(self, old: float) -> int:
        """As many images as ``old`` iterations of the original saw."""
        updates = round(old * self.updates)
        return int(self.accumulation * max(updates, min(old, 1)))


def split_batch(
    size: int, gpus: int, max_images: int, base: int = 0, agvm: bool = True
) -> Batch:
    """Images per GPU and micro-batches, as few of the latter as possible."""
    for name, value in (
        ('--batch-size', size),
        ('--gpus', gpus),
        ('--max-images-per-gpu', max_images),
    ):
        if value < 1:
            refuse(f'{name} {value} is not a number: write 1 or more')
    if size % gpus:
        refuse(
            f'--batch-size {size} cannot be divided among {gpus} GPUs: write '
            f'{size // gpus * gpus or gpus} or {(size // gpus + 1) * gpus}'
        )
    share = size // gpus
    # AGVM compares ranks or micro-batches
    least = 2 if agvm and gpus == 1 else 1
    if share < least:
        refuse(
            f'--batch-size {size} on one GPU leaves AGVM nothing to compare: '
            'write 2 or more'
        )
    accumulation = next(
        count
        for count in range(least, share + 1)
        if share % count == 0 and share // count <= max_images
    )
    return Batch(size, gpus, share // accumulation, accumulation, base)


def plan_training(
    result: Plan,
    cfg: Config,
    batch: Batch,
    wanted: Optional[str],
    dataset: str,
    images: Optional[int],
    agvm: bool = True,
) -> Tuple[int, float]:
    """Plan optimizer, schedule and AGVM.

    Args:
        result: The plan, which changes.
        cfg: The original.
        batch: The new batch.
        wanted: An optimizer to change to.
        dataset: Type of the data set, which chooses the learning-rate rule.
        images: In the training set; None to count them.
        agvm: Whether AGVM trains.

    Returns:
        Updates of the warm-up, and of the whole training.
    """
    plan_optimizer(result, cfg, batch, wanted, dataset)
    recipe = recipe_of(
        wanted or type_name(cfg.optim_wrapper.optimizer['type']),
        cfg.train_cfg,
    )
    clip_norm = at(recipe.clip_norm, batch.size)
    if wanted and clip_norm:
        result.diff['optim_wrapper']['clip_grad'] = dict(max_norm=clip_norm)
        result.because(
            f'gradients clipped to norm {clip_norm:g}, as in the recipe'
        )
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
    if iterations:
        new = math.ceil(total * batch.accumulation)
        result.because(
            f'not changed, to be checked: {", ".join(iterations)}; they count '
            f'iterations or images, and the new run has {new} iterations of '
            f'{batch.size // batch.accumulation} images, '
            f'{batch.times:.3g} times as many as in the original'
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
        refuse(
            f'optim_wrapper has several, {[*wrapper]}, but AGVM modulates one '
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


def plan_optimizer(
    result: Plan, cfg: Config, batch: Batch, wanted: Optional[str], data: str
) -> None:
    """The optimizer and its learning rate."""
    optimizer = cfg.optim_wrapper.optimizer
    own = type_name(optimizer['type'])
    name = wanted or own
    if wanted is not None and wanted not in OPTIONS:
        refuse(
            f'--optimizer {wanted} is unknown: write one of '
            f'{", ".join(OPTIONS)}, or set it in the original'
        )
    if name == own:
        rule, origin = rule_of(name, data)
        if not optimizer.get('lr'):
            refuse(
                'optim_wrapper.optimizer of the config has no lr: write one'
            )
        lr = optimizer['lr'] * rule(batch.size) / rule(batch.base)
        change: Dict[str, Any] = dict(lr=rounded(lr))
        reason = (
            f'learning rate {optimizer["lr"]:g} -> {change["lr"]:g}: scaled '
            f'from batch {batch.base}, linear up to {rule.knee}, then x '
            f'{rule.growth:.3f} per doubling ({origin})'
        )
    else:
        change, reason = another_optimizer(optimizer, name, batch, data)
    result.diff['optim_wrapper'] = dict(optimizer=change)
    result.because(reason)
    # otherwise --auto-scale-lr would scale once more; MMEngine compares it
    # with a batch without accumulation
    result.diff['auto_scale_lr'] = dict(
        enable=False, base_batch_size=batch.gpus * batch.images_per_gpu
    )


def another_optimizer(
    old: Dict[str, Any], name: str, batch: Batch, data: str
) -> Tuple[Dict[str, Any], str]:
    """The config of an optimizer other than the original's, and why."""
    like, options = OPTIONS[name]
    replaced = type_name(old['type'])
    if like == 'SGD' and 'ADE20K' in data:
        options = dict(options, weight_decay=5e-4)
    _, papers = find_rule(like, data)
    usual = papers or RULES[like, 'COCO']
    rule, known = usual, 'not in the paper: try others'
    if like == name and papers is not None:
        known = "the paper's"
    elif 'LAMB' in name:
        rule = LAMB_RULE
    elif name in STUDY_RULES:
        rule, known = STUDY_RULES[name], BY_STUDY
    lr = rule(batch.size)
    if name in STUDY_RULES and replaced == like and old.get('lr'):
        # the rule gives multiples of AdamW's rate
        times = old['lr'] / usual(batch.base)
        lr *= times
        known = (
            f'times {times:.3g}, as its {old["lr"]:g} at {batch.base} is to '
            f"the {usual(batch.base):.3g} of the paper's rule; {known}"
        )
    betas = f' and betas {options["betas"]}' if 'betas' in options else ''
    return dict(_delete_=True, type=name, lr=rounded(lr), **options), (
        f'{replaced} -> {name} with learning rate {rounded(lr):g}{betas}: '
        f'{rule} ({known})'
    )


def rule_of(optimizer: str, dataset: str) -> Tuple[LRRule, str]:
    """The rule for the learning rate, and its source."""
    _, rule = find_rule(optimizer, dataset)
    if rule is not None:
        return rule, "the paper's rule"
    if optimizer in STUDY_RULES:
        return STUDY_RULES[optimizer], BY_STUDY
    if 'LAMB' in optimizer:
        return (
            LAMB_RULE,
            "the rule of this project's recipes, not in the paper",
        )
    like = 'AdamW' if is_adaptive(optimizer) else 'SGD'
    return (
        find_rule(like, dataset)[1] or RULES[like, 'COCO'],
        f'as for {like}, since the paper has no rule for {optimizer} here',
    )


def rounded(value: float) -> float:
    """To four digits."""
    return float(f'{value:.4g}')


def plan_schedule(
    result: Plan,
    cfg: Config,
    batch: Batch,
    recipe: Recipe,
    images: Optional[int],
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
        why = "the paper's for segmentation"
    else:
        images = images or count_images(cfg.train_dataloader.dataset)
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
    result.diff['param_scheduler'] = schedule(
        schedulers, own, batch, wanted, epoch
    )
    return wanted, total


def plain(cfg: Config, value: Dict[str, Any]) -> Dict[str, Any]:
    """A config without the scope that a ``package::`` base adds."""
    value = with_strings(value)
    if value.get('_scope_') == cfg.get('default_scope'):
        value.pop('_scope_', None)
    return value


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
) -> List[Dict[str, Any]]:
    """The schedulers, with another warm-up and scaled iterations.

    Args:
        schedulers: The original's.
        own: Which of them is the warm-up.
        batch: The new batch.
        warmup: Updates of the new warm-up.
        epoch: Updates in an epoch, for runs that count in epochs.
    """
    end = warmup * batch.accumulation  # schedulers count iterations
    result = []
    for index, old in enumerate(schedulers):
        new = dict(old)
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


def scaled(value: Any, batch: Batch) -> Any:
    """Iterations, or lists of them, of the new batch."""
    if isinstance(value, (list, tuple)):
        return [scaled(item, batch) for item in value]
    if value is None or math.isinf(value):
        return value
    return batch.iterations(value)


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
