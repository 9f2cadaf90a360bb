"""The text of a config file: its difference to a handwritten base.

There is a function for each kind of difference.
"""

import re
import textwrap
from dataclasses import replace

from mmagvm.recipes.lr_scaling import SOAP_OPTIONS, at
from mmagvm.recipes.writing.config_file import ConfigFile, tagged

#: tau of the settings that a config inherits as ``_base_.agvm``.
INHERITED_INTERVAL = 10


def _comment(text: str) -> str:
    """A comment in lines of 79 characters."""
    return textwrap.fill(
        text,
        79,
        initial_indent='# ',
        subsequent_indent='# ',
        break_on_hyphens=False,
    )


def _headline(config: ConfigFile) -> str:
    """The comment of a config that states a batch size."""
    text = f'batch {config.batch_size}{config.note}'
    if config.recipe.epochs is not None:
        text += f'; an epoch is {config.epoch} iterations'
    return _comment(text)


def _optimizer(config: ConfigFile) -> str:
    """The optimizer's learning rate and clipping."""
    clip_norm = at(config.recipe.clip_norm, config.batch_size)
    clip = '' if clip_norm is None else f'clip_grad=dict(max_norm={clip_norm})'
    settings = filter(None, (f'optimizer=dict(lr={config.lr})', clip))
    return f'optim_wrapper = dict({", ".join(settings)})'


# -- a batch size


def plain(config: ConfigFile) -> str:
    """Rate and warm-up of a batch size."""
    return f"""\
{_headline(config)}
_base_ = './_base_/{config.model}_{tagged(config.tag, config.ending)}.py'
{_optimizer(config)}
param_scheduler = [dict(_base_.warmup, end={config.warmup_end}), _base_.decay]
auto_scale_lr = dict(base_batch_size={config.batch_size})
"""


def align(config: ConfigFile) -> str:
    """The same with the official code's warm-up and clipping."""
    begin, end = config.recipe.clip_window(config.batch_size)
    warmup = f'dict(_base_.align_warmup, end={config.warmup_end})'
    return f"""\
{_headline(config)}
_base_ = './_base_/{config.model}_{config.ending}.py'
{_optimizer(config)}
param_scheduler = [{warmup}, _base_.decay]
custom_hooks = [dict(type='ClipGradWindowHook', begin={begin}, end={end})]
auto_scale_lr = dict(base_batch_size={config.batch_size})
"""


def poly(config: ConfigFile) -> str:
    """The same counted in iterations, with ten checkpoints."""
    tenth = config.iterations // 10
    return f"""\
{_headline(config)}
_base_ = './_base_/{config.model}_ade20k-512x512.py'
{_optimizer(config)}
param_scheduler = [
    dict(_base_.warmup, end={config.warmup_end}),
    dict(_base_.decay, end={config.iterations}),
]
train_cfg = dict(max_iters={config.iterations}, val_interval={tenth})
default_hooks = dict(checkpoint=dict(interval={tenth}))
auto_scale_lr = dict(base_batch_size={config.batch_size})
"""


def megdet(config: ConfigFile) -> str:
    """Rate, batch norm and images per GPU of a row of MegDet's table."""
    images = config.images
    model = memory = ''
    if config.bn_size >= 32:
        memory = '        with_cp=True,  # to fit into memory\n'
    if config.bn_size:
        model = f"""\
model = dict(
    backbone=dict(
        norm_cfg=dict(type='CGBN', bn_size={config.bn_size}),
        norm_eval=False,
{memory}\
    )
)
"""
    return f"""\
{_headline(config)}
_base_ = './_base_/{config.model}_{config.ending}.py'
{model}\
train_dataloader = dict(batch_size={images}, num_workers={images})
{_optimizer(config)}
auto_scale_lr = dict(base_batch_size={config.batch_size})
"""


# -- AGVM


def agvm(config: ConfigFile) -> str:
    """AGVM, on the config without it."""
    return _agvm(
        config, f'dict(_base_.agvm, {_interval(config)}begin={config.begin})'
    )


def agvm_align(config: ConfigFile) -> str:
    """AGVM with the official code's bounds."""
    return _agvm(
        config,
        f"""dict(
    _base_.agvm, {_interval(config)}begin={config.begin}, \
ratio_range=_base_.align_ratio_range
)""",
        hooks='[*_base_.custom_hooks, *_base_.agvm_hooks]',
    )


def agvm_extreme(config: ConfigFile) -> str:
    """AGVM with the settings that appendix A.6 names."""
    return _agvm(
        config,
        f"""dict(
    _base_.agvm,
    interval={config.interval},
    begin={config.begin},
    eps=1e-6,
    ratio_range=(0.1, 10.0),
)""",
    )


def _interval(config: ConfigFile) -> str:
    """tau where it is not inherited."""
    if config.interval == INHERITED_INTERVAL:
        return ''
    return f'interval={config.interval}, '


def _agvm(
    config: ConfigFile, settings: str, hooks: str = '_base_.agvm_hooks'
) -> str:
    """A config with AGVM, which logs what it measures."""
    base = config.beside(re.sub('^agvm-?', '', config.tag))
    return f"""\
{_comment(f'batch {config.batch_size} with AGVM{config.note}')}
_base_ = './{base}.py'
optim_wrapper = {settings}
custom_hooks = {hooks}
default_hooks = dict(logger=dict(interval={config.interval}))
"""


# -- other optimizers


def lars(config: ConfigFile) -> str:
    """LARS in place of SGD."""
    text = 'with LARS: settings not in the paper, see the README'
    return f"""\
{_comment(f'batch {config.batch_size} {text}')}
_base_ = './{config.beside('')}.py'
optim_wrapper = dict(optimizer=dict(type='LARS', trust_coefficient=0.02))
"""


def lamb(config: ConfigFile) -> str:
    """LAMB in place of AdamW."""
    settings = f"type='LAMB', lr={config.lr}, weight_decay=0.05"
    return f"""\
{_comment(f'batch {config.batch_size} with LAMB: settings not in the paper')}
_base_ = './{config.beside('adamw')}.py'
optim_wrapper = dict(
    optimizer=dict(_delete_=True, {settings})
)
"""


def pmd_lamb(config: ConfigFile) -> str:
    """PMD-LAMB in place of LAMB."""
    text = 'with PMD-LAMB: period and factor are not from a paper'
    return f"""\
{_comment(f'batch {config.batch_size} {text}')}
_base_ = './{config.beside('lamb')}.py'
optim_wrapper = dict(
    optimizer=dict(type='PMDLAMB', period=100, moment_decay=0.5)
)
"""


def soap(config: ConfigFile) -> str:
    """SOAP in place of AdamW."""
    return _soap(config, 'adamw', clip='')


def soap_on_sgd(config: ConfigFile) -> str:
    """SOAP in place of SGD, with clipped gradients."""
    norm = at(config.recipe.clip_norm, config.batch_size)
    # mmseg's bases have None, which a dict cannot inherit from
    delete = '_delete_=True, ' if config.data == 'ADE20K' else ''
    return _soap(config, '', f'    clip_grad=dict({delete}max_norm={norm}),\n')


def _soap(config: ConfigFile, base: str, clip: str) -> str:
    text = (
        f"with SOAP: this project's own, by its study{config.note}; not in "
        f'the paper, not run on {config.data}'
    )
    options = ''.join(f'        {k}={v!r},\n' for k, v in SOAP_OPTIONS.items())
    return f"""\
{_comment(f'batch {config.batch_size} {text}')}
_base_ = './{config.beside(base)}.py'
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type='SOAP',
        lr={config.lr},
{options}    ),
{clip}\
)
"""


# -- ablations, each based on the one before


def measured(config: ConfigFile) -> str:
    """Measured but not modulated."""
    base = f'{config.recipe_name}/{config.beside("agvm")}'
    return f"""\
# batch {config.batch_size}, measured from the start but not modulated
_base_ = '../{base}.py'
optim_wrapper = dict(modulate=False, begin=0)
"""


def without_fpn(config: ConfigFile) -> str:
    """Without FPN."""
    base = replace(config, model=f'{config.model}_fpn').name
    detector = config.model.partition('_')[0]
    return f"""\
# like its base, but without FPN
_base_ = [
    './{base}.py',
    './_base_/{detector}_without-fpn.py',
]
model = _base_.without_fpn
"""


def few_proposals(config: ConfigFile) -> str:
    """With few proposals in the detection head."""
    return f"""\
# like its base, but with 10 proposals in the detection head instead of 512
_base_ = './{config.beside('measure')}.py'
model = dict(train_cfg=dict(rcnn=dict(sampler=dict(num=10))))
"""


def fixed_head(config: ConfigFile) -> str:
    """With the last head fixed."""
    two_stages = config.recipe_name == 'faster_rcnn'
    text = 'detection head' if two_stages else 'head'
    head = 'roi_head.bbox_head' if two_stages else 'bbox_head'
    base = config.beside(config.tag.replace('fixed-head-', ''))
    return f"""\
# like its base, but with a fixed {text}: measured, never changed
_base_ = './{base}.py'
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={{'{head}': dict(lr_mult=0.0)}})
)
"""
