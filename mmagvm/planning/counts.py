"""Numbers of a config that count iterations, epochs or images.

Those with a known dependence on the batch size are converted. All others are
reported, because their meaning changes silently.
"""

import re
from typing import Any, Dict, Iterator, List, Optional, Tuple

from mmengine.config import Config

from mmagvm.engine.config_types import type_name

#: Keys of numbers that may count.
COUNTS = re.compile(
    r'(^|_)(iters?|iterations?|epochs?|intervals?|steps?|warm\w*|burn\w*|'
    r'times|period|periods|begin|start|end|queue\w*|memory\w*|buffer|'
    r'buffer_size|freq|frequency|every|patience|cooldown|total|milestones|'
    r'window_size|dataset_size|num_samples|batch_size|num_last_epochs)($|_)',
    re.IGNORECASE,
)
#: Keys that match and count something inside of one forward pass, or nothing.
WITHIN = re.compile(
    r'start_(level|factor|channels)|linear_(start|end)|f_start|timesteps|'
    r'(subdivision|rfp|im2col|train|eval)_steps?|(stack|downsample|jitter)_'
    r'times|memory_size_bytes|out_end_level|end_level|end_factor|pct_start|'
    r'(start|end)_(ratio|index|idx|dim|stage|layer)|step_per_epoch|'
    r'batch_size_per_\w+|by_epoch|log_metric_by_epoch'
)
#: Parts of a config that have no effect on training, by their last key.
ELSEWHERE = ('pipeline', 'tracker', 'reid', 'test_cfg', 'init_cfg')
#: Sections that training reads.
SECTIONS = (
    *('model', 'train_dataloader', 'optim_wrapper', 'param_scheduler'),
    *('train_cfg', 'default_hooks', 'custom_hooks', 'log_processor'),
)
#: Hooks with a moving average of weights, and their default momentum.
AVERAGES = dict(EMAHook=2e-4, MeanTeacherHook=1e-3)
#: Averages that lower their momentum over gamma iterations, and its default.
GAMMAS = dict(ExpMomentumEMA=2000, MomentumAnnealingEMA=100)

#: Hooks that count epochs by default.
EPOCHS = ('CheckpointHook', 'PipelineSwitchHook', 'YOLOXModeSwitchHook')


def averaged(momentum: float, times: float) -> float:
    """The momentum that forgets as fast per image.

    Args:
        momentum: Share of the new weights, in each iteration.
        times: Images of an iteration, over those of the original's.
    """
    return float(f'{1 - (1 - momentum) ** times:.4g}')


def convert_average(
    hook: Dict[str, Any], times: float
) -> Optional[Tuple[Dict[str, Any], str]]:
    """What changes in a hook that averages weights, and why.

    Args:
        hook: Its config.
        times: As in :func:`averaged`.
    """
    name = type_name(hook['type'])
    kind = type_name(hook.get('ema_type'))
    if name not in AVERAGES or kind == 'StochasticWeightAverage':
        return None
    old = hook.get('momentum', AVERAGES[name])
    if not 0 < old < 1 or times == 1:
        return None
    new: Dict[str, Any] = dict(momentum=averaged(old, times))
    changes = [f'momentum {old:g} -> {new["momentum"]:g}']
    if kind in GAMMAS:
        gamma = hook.get('gamma', GAMMAS[kind])
        new['gamma'] = max(1, round(gamma / times))
        changes.append(f'gamma {gamma:g} -> {new["gamma"]}')
    if hook.get('begin_iter'):
        new['begin_iter'] = max(1, round(hook['begin_iter'] / times))
        changes.append(
            f'begin_iter {hook["begin_iter"]} -> {new["begin_iter"]}'
        )
    return new, (
        f'{name}: {", ".join(changes)}, so that it forgets as fast per image '
        '(it averages in every iteration)'
    )


def unchanged(
    cfg: Config, diff: Dict[str, Any], by_epoch: bool
) -> Tuple[List[str], List[str]]:
    """Numbers that do not change: those of iterations, and of epochs.

    Args:
        cfg: The original.
        diff: What changes in it.
        by_epoch: Whether the length of the training is given in epochs.

    Returns:
        Each as ``where=value``, once.
    """
    iterations: Dict[str, None] = {}
    epochs: Dict[str, None] = {}
    for section in SECTIONS:
        if section == 'param_scheduler' and section in diff:
            continue  # converted as a whole; epochs stay as they are
        default = by_epoch and section == 'train_cfg'
        for where, owner, value in _counts(cfg.get(section), section, {}):
            if _is_changed(diff, where, value):
                continue
            key = where.rpartition('.')[2]
            counts_epochs = owner.get(
                'by_epoch', default or type_name(owner.get('type')) in EPOCHS
            )
            if 'iter' in key or section == 'log_processor':
                counts_epochs = False
            found = epochs if counts_epochs or 'epoch' in key else iterations
            found[f'{_readable(where, owner)}={value}'] = None
    return list(iterations), list(epochs)


def _counts(
    value: Any, where: str, owner: Dict[str, Any]
) -> Iterator[Tuple[str, Dict[str, Any], Any]]:
    """Path, enclosing dict with a type, and value of numbers that count."""
    if isinstance(value, dict):
        owner = value if 'type' in value or not owner else owner
        for key, item in value.items():
            key = str(key)
            if key.endswith(ELSEWHERE):
                continue
            here = f'{where}.{key}'
            if _holds_dicts(item):
                yield from _counts(item, here, owner)
            elif _is_count(here, key, owner, item):
                yield here, owner, item
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _counts(item, f'{where}[{index}]', owner)


def _holds_dicts(value: Any) -> bool:
    if isinstance(value, dict):
        return True
    return isinstance(value, (list, tuple)) and any(
        isinstance(item, (dict, list, tuple)) and _holds_dicts(item)
        for item in value
    )


def _is_count(where: str, key: str, owner: Dict[str, Any], value: Any) -> bool:
    if not _is_number(value):
        return False
    section = where.partition('.')[0].partition('[')[0]
    if key == 'momentum':
        # an average over iterations; an optimizer's is over updates
        return section in ('model', 'custom_hooks', 'default_hooks')
    if key == 'window_size':
        return section == 'log_processor'
    if section == 'train_dataloader' and key == 'times':
        return False  # counted in the images of an epoch
    return bool(COUNTS.search(key)) and not WITHIN.fullmatch(key)


def _is_number(value: Any) -> bool:
    """Whether a value is a positive number, or a list of them."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_number(item) for item in value)
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value > 0
    )


def _is_changed(diff: Any, where: str, value: Any) -> bool:
    """Whether ``diff`` decides what is there.

    It writes lists as a whole, so that an item may be as before.
    """
    in_list = False
    for key in re.findall(r'[^.\[\]]+', where):
        if isinstance(diff, dict) and key in diff:
            diff = diff[key]
        elif isinstance(diff, (list, tuple)) and key.isdecimal():
            if int(key) >= len(diff):
                return False
            diff, in_list = diff[int(key)], True
        else:
            return isinstance(diff, dict) and bool(diff.get('_delete_'))
    return not in_list or bool(diff != value)


def _readable(where: str, owner: Dict[str, Any]) -> str:
    """The path with a type in place of a list's index."""
    name = type_name(owner.get('type'))
    head, dot, key = where.rpartition('.')
    return f'{head[:-1]}: {name}]{dot}{key}' if head.endswith(']') else where
