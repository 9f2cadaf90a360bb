"""Groups: each trainable parameter once, few groups, all options."""

import pytest
import torch
from mmengine.optim import DefaultOptimWrapperConstructor, build_optim_wrapper
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    DefaultScope,
)
from torch import nn
from toy import MODULES, make_model, train, wrapper_cfg

from mmagvm.core.modules import find_anchor, find_modules


def groups_of(wrapper):
    return wrapper.optimizer.param_groups


class Nested(nn.Module):
    """A detector in ``student``, and maybe a frozen ``teacher``."""

    def __init__(self, inner='student', teacher=False):
        super().__init__()
        if teacher:
            self.teacher = make_model().requires_grad_(False)
        self.add_module(inner, make_model())
        self.track_head = nn.Linear(2, 2)


def test_modules_are_found():
    model = make_model()
    assert find_modules(model) == list(MODULES[:-1])
    for param in model.neck.parameters():
        param.requires_grad = False
    assert 'neck' not in find_modules(model)


@pytest.mark.parametrize('teacher', [False, True])
@pytest.mark.parametrize('inner', ['student', 'detector'])
def test_what_holds_a_backbone_is_opened(inner, teacher):
    model = Nested(inner, teacher)
    wrapper = build_optim_wrapper(model, wrapper_cfg())
    assert wrapper.modulator.modules == [
        *(f'{inner}.{module}' for module in MODULES[:-1]),
        'track_head',
        'others',  # the scale
    ]
    assert wrapper.modulator.anchor == f'{inner}.backbone'


def test_a_wrapper_in_a_wrapper_is_opened():
    model = nn.Module()
    model.outer = Nested()
    assert find_modules(model)[:2] == [
        'outer.student.backbone',
        'outer.student.neck',
    ]


def test_a_backbone_is_not_opened():
    model = make_model()
    model.backbone.add_module('backbone', nn.Linear(2, 2))
    assert find_modules(model) == list(MODULES[:-1])


def test_anchor_is_the_image_encoder_where_there_is_no_backbone():
    model = nn.Module()
    model.text_encoder = nn.Linear(2, 2)
    model.image_encoder = nn.Linear(2, 2)
    model.decode_head = nn.Linear(2, 2)
    wrapper = build_optim_wrapper(model, wrapper_cfg())
    assert wrapper.modulator.anchor == 'image_encoder'
    del model.image_encoder
    with pytest.raises(
        ValueError,
        match=r"anchor='backbone' is not a module with trainable .*: set "
        r"anchor to one of \['text_encoder', 'decode_head'\]",
    ):
        build_optim_wrapper(model, wrapper_cfg())


def test_anchor_that_was_chosen_is_taken_or_refused():
    modules = ['student.backbone', 'student.neck', 'backbone']
    assert find_anchor(modules) == 'backbone'
    assert find_anchor(modules[:2]) == 'student.backbone'
    assert find_anchor(modules, 'student.neck') == 'student.neck'
    with pytest.raises(ValueError, match="anchor='neck' is not a module"):
        find_anchor(modules, 'neck')


def test_a_single_module_is_refused_unless_nothing_is_modulated():
    model = nn.Module()
    model.backbone = make_model().backbone
    with pytest.raises(
        ValueError, match=r"'backbone' is the only module .*modules=\[...\]"
    ):
        build_optim_wrapper(model, wrapper_cfg())
    build_optim_wrapper(model, wrapper_cfg(modulate=False))
    parts = ['backbone.0', 'backbone.2']
    build_optim_wrapper(model, wrapper_cfg(modules=parts, anchor=parts[0]))


def test_one_group_per_module_with_every_parameter_once():
    model = make_model()
    groups = groups_of(build_optim_wrapper(model, wrapper_cfg()))
    assert [group['module'] for group in groups] == list(MODULES)
    names = dict(model.named_parameters())
    grouped = {
        name: param
        for group in groups
        for name, param in zip(group['param_names'], group['params'])
    }
    assert grouped == names
    assert sum(len(group['params']) for group in groups) == len(names)


def test_options_split_a_module_and_are_the_hosts():
    model = nn.Sequential()
    model.backbone = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.head = nn.Linear(2, 2)
    paramwise_cfg = dict(
        norm_decay_mult=0.0,
        bias_lr_mult=2.0,
        custom_keys={'head': dict(lr_mult=0.1, decay_mult=0.5)},
    )
    cfg = wrapper_cfg(paramwise_cfg=paramwise_cfg)
    ours = groups_of(build_optim_wrapper(model, cfg))
    host_cfg = dict(
        optimizer=cfg['optimizer'], paramwise_cfg=dict(paramwise_cfg)
    )
    host = groups_of(build_optim_wrapper(model, host_cfg))
    options = {
        param: {
            k: v
            for k, v in group.items()
            if k not in ('params', 'param_names', 'module')
        }
        for group in ours
        for param in group['params']
    }
    for group in host:
        (param,) = group.pop('params')
        assert options[param] == group
    assert [group['module'] for group in ours] == [
        'backbone',
        'backbone',
        'backbone',
        'head',
    ]
    assert [len(group['params']) for group in ours] == [1, 1, 2, 2]


def test_modules_can_be_listed_and_the_rest_is_others():
    model = make_model()
    wrapper = build_optim_wrapper(
        model, wrapper_cfg(modules=['backbone.0', 'backbone', 'roi_head'])
    )
    assert wrapper.modulator.modules == [
        'backbone.0',
        'backbone',
        'roi_head',
        'others',
    ]
    module_of = {
        name: group['module']
        for group in groups_of(wrapper)
        for name in group['param_names']
    }
    assert module_of['backbone.0.weight'] == 'backbone.0'
    assert module_of['backbone.2.weight'] == 'backbone'
    assert module_of['neck.weight'] == 'others'


def test_frozen_parameters_are_in_groups_as_in_mmengine():
    model = make_model()
    model.backbone[0].requires_grad_(False)
    model.neck.requires_grad_(False)
    cfg = wrapper_cfg()
    wrapper = build_optim_wrapper(model, cfg)
    host = build_optim_wrapper(model, dict(optimizer=cfg['optimizer']))
    assert {p for g in groups_of(wrapper) for p in g['params']} == {
        p for g in groups_of(host) for p in g['params']
    }
    names = {g['module']: g['param_names'] for g in groups_of(wrapper)}
    assert 'backbone.0.weight' in names['backbone']
    # the neck has no module, as nothing of it could be measured
    assert names[None] == ['neck.weight', 'neck.bias']
    assert wrapper.modulator.modules == [m for m in MODULES if m != 'neck']


def test_frozen_parameters_with_options_are_left_out_as_in_mmengine():
    model = make_model()
    model.backbone[0].requires_grad_(False)
    model.neck.requires_grad_(False)
    cfg = wrapper_cfg(paramwise_cfg=dict(bias_lr_mult=2.0))
    host_cfg = dict(
        optimizer=cfg['optimizer'], paramwise_cfg=dict(bias_lr_mult=2.0)
    )
    ours, host = (
        {
            p
            for g in groups_of(build_optim_wrapper(model, c))
            for p in g['params']
        }
        for c in (cfg, host_cfg)
    )
    assert ours == host


@pytest.mark.parametrize('paramwise_cfg', [None, dict(bias_lr_mult=2.0)])
def test_shared_parameters_are_held_once(paramwise_cfg):
    model = make_model()
    model.twin = model.neck
    model.second = nn.Linear(7, 5)
    model.second.weight = model.neck.weight
    wrapper = build_optim_wrapper(
        model, wrapper_cfg(paramwise_cfg=paramwise_cfg)
    )
    names = [n for group in groups_of(wrapper) for n in group['param_names']]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())


def test_child_of_a_shared_parameter_alone_is_no_module():
    model = make_model()
    model.tied_head = nn.Linear(7, 5, bias=False)
    model.tied_head.weight = model.neck.weight
    wrapper = build_optim_wrapper(model, wrapper_cfg())
    assert wrapper.modulator.modules == list(MODULES)


def test_unknown_module_is_refused():
    with pytest.raises(
        ValueError,
        match=r"\['nose'\] have no trainable "
        r"parameters; the model has \['backbone', 'neck'",
    ):
        build_optim_wrapper(
            make_model(), wrapper_cfg(modules=['backbone', 'nose'])
        )


@pytest.mark.parametrize('wrapper_type', ['OptimWrapper', 'AmpOptimWrapper'])
def test_plain_wrapper_is_refused(wrapper_type):
    cfg = dict(wrapper_cfg(), type=wrapper_type)
    with pytest.raises(
        ValueError, match=f"type='{wrapper_type}'.*set type='AGVMOptimWrapper'"
    ):
        build_optim_wrapper(make_model(), cfg)


# -- composed with other constructors


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DepthConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise decay like mmdet's."""

    def add_params(self, params, module, **kwargs):
        rate = self.paramwise_cfg['decay_rate']
        for name, param in module.named_parameters():
            if param.requires_grad:
                depth = name.count('.')
                params.append(
                    dict(
                        params=[param],
                        param_names=[name],
                        group_name=f'layer_{depth}',
                        lr=self.base_lr * rate**depth,
                        weight_decay=0.0 if param.ndim == 1 else self.base_wd,
                    )
                )


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ThreeGroupsConstructor:
    """Like those of YOLO trainers: no ``add_params``, no names."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        self.cfg = optim_wrapper_cfg
        self.optimizer_cfg = self.cfg.pop('optimizer')
        self.optimizer_cfg['weight_decay'] *= paramwise_cfg.get('scale', 1)
        self.images = self.optimizer_cfg.pop('batch_size_per_gpu')

    def __call__(self, model):
        params = list(model.parameters())
        self.optimizer_cfg['params'] = [
            dict(params=[p for p in params if p.ndim == 2]),
            dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0),
        ]
        optimizer = OPTIMIZERS.build(self.optimizer_cfg)
        return OPTIM_WRAPPERS.build(
            self.cfg, default_args=dict(optimizer=optimizer)
        )


def options_by_parameter(wrapper, keys=('lr', 'weight_decay', 'momentum')):
    return {
        param: {key: group[key] for key in keys}
        for group in wrapper.optimizer.param_groups
        for param in group['params']
    }


def composed(base, paramwise_cfg, **optimizer):
    """The options of the parameters, ours and MMEngine's."""
    model = make_model()
    cfg = wrapper_cfg(paramwise_cfg=paramwise_cfg, base_constructor=base)
    cfg['optimizer'].update(optimizer)
    host = build_optim_wrapper(
        model,
        dict(
            type='OptimWrapper',
            optimizer=dict(cfg['optimizer']),
            constructor=base,
            paramwise_cfg=dict(paramwise_cfg),
        ),
    )
    return build_optim_wrapper(model, cfg), host


def test_layer_wise_decay_is_kept():
    ours, host = composed('DepthConstructor', dict(decay_rate=0.5))
    assert options_by_parameter(ours) == options_by_parameter(host)
    assert ours.modulator.modules == list(MODULES)
    names = [n for g in groups_of(ours) for n in g['param_names']]
    assert len(names) == len(set(names)) == 13
    backbone = [g for g in groups_of(ours) if g['module'] == 'backbone']
    assert len(backbone) == 2  # weights and biases of one depth
    assert {g['group_name'] for g in backbone} == {'layer_2'}


def test_constructor_that_makes_its_own_groups_is_kept():
    ours, host = composed(
        'ThreeGroupsConstructor', dict(scale=3), batch_size_per_gpu=8
    )
    options = options_by_parameter(ours)
    assert options == options_by_parameter(host)
    assert {o['weight_decay'] for o in options.values()} == {0.0, 0.03}


@pytest.mark.parametrize('name', ['mmdet', 'mmseg'])
def test_layer_wise_decay_of_the_hosts_is_kept(name):
    pytest.importorskip(name)
    with DefaultScope.overwrite_default_scope(name):
        base = 'LearningRateDecayOptimizerConstructor'
        model = nn.Module()
        model.backbone = type('ConvNeXt', (nn.Module,), {})()
        model.backbone.downsample_layers = nn.ModuleList([nn.Linear(2, 2)])
        model.backbone.stages = nn.ModuleList(
            nn.ModuleList([nn.Linear(2, 2)]) for _ in range(4)
        )
        model.neck = nn.Linear(2, 2)
        OPTIM_WRAPPER_CONSTRUCTORS.import_from_location()
        paramwise_cfg = dict(
            decay_rate=0.7, decay_type='layer_wise', num_layers=6
        )
        cfg = wrapper_cfg(paramwise_cfg=paramwise_cfg, base_constructor=base)
        host_cfg = dict(
            type='OptimWrapper',
            optimizer=cfg['optimizer'],
            constructor=base,
            paramwise_cfg=paramwise_cfg,
        )
        ours = build_optim_wrapper(model, cfg)
        host = build_optim_wrapper(model, host_cfg)
    assert options_by_parameter(ours) == options_by_parameter(host)
    assert len({g['lr'] for g in groups_of(ours)}) == 6


@pytest.mark.parametrize(
    'base, key, kept',
    [
        ('DefaultOptimWrapperConstructor', 'decay_rate', dict(bias_lr_mult=2)),
        ('DepthConstructor', 'custom_keys', dict(decay_rate=0.5)),
        ('DepthConstructor', 'norm_decay_mult', dict(decay_rate=0.5)),
    ],
)
def test_options_that_mean_nothing_are_refused(base, key, kept):
    value = {} if key == 'custom_keys' else 0.5
    with pytest.raises(
        ValueError,
        match=f"paramwise_cfg key '{key}' is not used by {base}.*"
        'base_constructor',
    ):
        composed(base, {key: value, **kept})


def test_optimizer_of_other_arguments_is_refused():
    class OfModel(torch.optim.SGD):
        def __init__(self, model, lr):
            super().__init__(model.parameters(), lr)

    cfg = wrapper_cfg()
    cfg['optimizer'] = dict(type=OfModel, lr=0.1)
    with pytest.raises(ValueError, match="'OfModel' in .* and no params"):
        build_optim_wrapper(make_model(), cfg)


def test_rate_of_groups_alone_is_scaled_and_logged():
    """Options of an optimizer without defaults for them."""

    class GroupRates(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            del self.defaults['lr']

    cfg = wrapper_cfg(accumulative_counts=2)
    cfg['optimizer'] = dict(type=GroupRates, lr=0.1)
    model = make_model()
    wrapper = build_optim_wrapper(model, cfg)
    wrapper.initialize_count_status(model, 0, 4)
    train(model, wrapper, 2, accumulation=2)
    assert wrapper.agvm.modulator.measured == 1
    assert wrapper.get_lr() == dict(lr=[0.1] * len(MODULES))


def test_base_constructor_cannot_be_agvms():
    cfg = wrapper_cfg(base_constructor='AGVMOptimWrapperConstructor')
    with pytest.raises(ValueError, match='cannot be the base of itself'):
        build_optim_wrapper(make_model(), cfg)
