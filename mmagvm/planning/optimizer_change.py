"""The optimizer of a large-batch version, its learning rate and clipping."""

from typing import Any, Dict, Optional, Tuple

from mmengine.config import Config

from mmagvm.engine.config_types import type_name
from mmagvm.errors import refuse
from mmagvm.planning.batch import Batch
from mmagvm.planning.config_reader import is_adaptive, recipe_of
from mmagvm.planning.plan import Plan, rounded
from mmagvm.recipes.lr_scaling import (
    RECIPES,
    RULES,
    SOAP_OPTIONS,
    STUDY_RULES,
    LRRule,
    at,
    find_rule,
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


def plan_optimizer(
    result: Plan, cfg: Config, batch: Batch, wanted: Optional[str], data: str
) -> None:
    """The optimizer and its learning rate.

    Args:
        result: The plan, which changes.
        cfg: The original.
        batch: The new batch.
        wanted: An optimizer to change to.
        data: Type of the data set, which chooses the learning-rate rule.
    """
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
            f'from batch {batch.base}, {rule.growing} ({origin})'
        )
    else:
        change, reason = another_optimizer(optimizer, name, batch, data)
    result.diff['optim_wrapper'] = dict(optimizer=change)
    result.because(reason)
    if name != own:
        result.because(f'options of {name}: {compared(optimizer, change)}')
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
    family, _ = OPTIONS.get(replaced, (replaced, {}))
    if family == like and 'weight_decay' in old:
        options = dict(options, weight_decay=old['weight_decay'])
    elif like == 'SGD' and 'ADE20K' in data:
        options = dict(options, weight_decay=5e-4)
    _, papers = find_rule(like, data)
    usual = papers or RULES[like, 'COCO']
    rule, known = usual, 'not in the paper: try others'
    if like == name and papers is not None:
        known = papers_rule(data)
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
            f"the {usual(batch.base):.3g} of the paper's rule for COCO; "
            f'{known}'
        )
    elif name in STUDY_RULES:
        # where AdamW's own best rate is higher too, but is not known here
        known += ', for a segmenter up to 8 times'
    return dict(_delete_=True, type=name, lr=rounded(lr), **options), (
        f'{replaced} -> {name} with learning rate {rounded(lr):g}: {rule} '
        f'({known})'
    )


def compared(old: Dict[str, Any], new: Dict[str, Any]) -> str:
    """An optimizer's options beside the original's."""
    shown = []
    for key, value in new.items():
        if key in ('_delete_', 'type', 'lr'):
            continue
        if key not in old:
            shown.append(f'{key} {value}')
        elif old[key] == value:
            shown.append(f'{key} {value} as in the original')
        else:
            shown.append(f'{key} {old[key]} -> {value}')
    return ', '.join(shown)


def papers_rule(data: str) -> str:
    """Says which of the paper's rules a data set gets."""
    name, _ = find_rule('SGD', data)
    if name == 'COCO' and 'Coco' not in data:
        return f"the paper's rule for COCO, a hint for {data}"
    return f"the paper's rule for {name}"


def rule_of(optimizer: str, data: str) -> Tuple[LRRule, str]:
    """The rule for the learning rate, and its source."""
    name, rule = find_rule(optimizer, data)
    if rule is not None:
        return rule, papers_rule(data)
    if optimizer in STUDY_RULES:
        return STUDY_RULES[optimizer], BY_STUDY
    if 'LAMB' in optimizer:
        return (
            LAMB_RULE,
            "the rule of this project's recipes, not in the paper",
        )
    like = 'AdamW' if is_adaptive(optimizer) else 'SGD'
    own = find_rule(like, data)[1]
    return (
        own or RULES[like, 'COCO'],
        f'as for {like} on {name if own else "COCO"}, since the paper has no '
        f'rule for {optimizer} on {data}',
    )


def plan_clipping(
    result: Plan, cfg: Config, batch: Batch, wanted: Optional[str]
) -> None:
    """Clip gradients as the recipes do that change to an optimizer.

    A norm of the original stays: it is of gradients, not of an optimizer.
    """
    if wanted is None:
        return
    old = cfg.optim_wrapper.get('clip_grad')
    name = recipe_of(wanted, cfg.train_cfg)
    norm = at(RECIPES[name].clip_norm, batch.size)
    if old:
        shown = ', '.join(f'{k}={v}' for k, v in old.items())
        result.because(f'gradients are clipped as in the original: {shown}')
    elif norm:
        clip: Dict[str, Any] = dict(max_norm=norm)
        if 'clip_grad' in cfg.optim_wrapper:  # None cannot be inherited
            clip['_delete_'] = True
        result.diff['optim_wrapper']['clip_grad'] = clip
        result.because(
            f'gradients are clipped to norm {norm:g}, as in the recipe {name}'
        )
