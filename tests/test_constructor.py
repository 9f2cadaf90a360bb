"""Parameters to groups: every trainable one once, few groups, all options."""

import pytest
from mmengine.optim import build_optim_wrapper
from torch import nn
from toy import MODULES, make_model, wrapper_cfg

from mmagvm.core.modules import find_modules


def groups_of(wrapper):
    return wrapper.optimizer.param_groups


def test_modules_are_found():
    model = make_model()
    assert find_modules(model) == list(MODULES[:-1])
    for param in model.neck.parameters():
        param.requires_grad = False
    assert 'neck' not in find_modules(model)


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


def test_frozen_parameters_are_left_out():
    model = make_model()
    for param in model.backbone[0].parameters():
        param.requires_grad = False
    wrapper = build_optim_wrapper(model, wrapper_cfg())
    assert groups_of(wrapper)[0]['param_names'] == [
        'backbone.2.weight',
        'backbone.2.bias',
    ]


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
