"""The state that travels: round trips, other modules, plain checkpoints."""

import copy
import math
import pickle

import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim import (
    DefaultOptimWrapperConstructor,
    OptimWrapper,
    build_optim_wrapper,
)
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from toy import MODULES, make_model, train, wrapper_cfg

from mmagvm.engine.host import allow_checkpoints
from mmagvm.engine.optim_state import _fits

# with both package sets
pytestmark = pytest.mark.host


def trained(optimizer='SGD', updates=4, **settings):
    """A model and wrapper after some updates of two micro-batches."""
    settings = dict(interval=1, ema_decay=0.5, **settings)
    model = make_model()
    wrapper = build_optim_wrapper(
        model, wrapper_cfg(optimizer, accumulative_counts=2, **settings)
    )
    train(model, wrapper, updates, accumulation=2)
    return model, wrapper


@pytest.fixture(autouse=True)
def allowed():
    """The fork allows types for each load, and disallows them after it."""
    allow_checkpoints()


def through_a_file(state, tmp_path):
    """What torch.load makes of a saved state, all checks on."""
    torch.save(state, tmp_path / 'state.pth')
    return torch.load(tmp_path / 'state.pth', weights_only=True)


OWN_RULES = dict(
    estimator='pairs', restart_at_lr_drop=True, bound_by_grad_norm=True
)


@pytest.mark.parametrize('settings', [{}, OWN_RULES], ids=['paper', 'own'])
@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_resumed_training_equals_uninterrupted(optimizer, settings, tmp_path):
    model, wrapper = trained(optimizer, updates=2, **settings)
    for group in wrapper.optimizer.param_groups:
        group['lr'] *= 0.1
    train(model, wrapper, 4, accumulation=2, start=2)
    saved = through_a_file(
        [model.state_dict(), wrapper.state_dict()], tmp_path
    )
    resumed, other = trained(optimizer, updates=0, **settings)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    train(model, wrapper, 8, accumulation=2, start=4)
    train(resumed, other, 8, accumulation=2, start=4)
    assert other.modulator.lr_scale == wrapper.modulator.lr_scale
    assert other.modulator.state_dict() == wrapper.modulator.state_dict()
    waits = bool(settings) and optimizer == 'AdamW'  # for a second moment
    assert len(other.modulator.history) == 8 - waits
    for name, weight in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], weight)


def test_state_round_trip(tmp_path):
    _, wrapper = trained()
    _, other = trained(updates=0)
    other.load_state_dict(through_a_file(wrapper.state_dict(), tmp_path))
    state, loaded = wrapper.state_dict(), other.state_dict()
    assert loaded['agvm'] == state['agvm']
    assert loaded['param_groups'] == state['param_groups']


def test_checkpoint_with_other_modules(tmp_path, log):
    model, wrapper = trained('AdamW')
    saved = through_a_file(wrapper.state_dict(), tmp_path)
    modules = ['backbone.0', 'backbone.2', 'neck', 'roi_head']
    other_model = make_model()
    other_model.load_state_dict(model.state_dict())
    other = build_optim_wrapper(
        other_model,
        wrapper_cfg('AdamW', modules=modules, anchor='backbone.0'),
    )
    other.load_state_dict(saved)
    assert "['backbone.0', 'backbone.2', 'roi_head'] start with" in log[-1]
    assert (
        other.modulator.lr_scale['neck']
        == wrapper.modulator.lr_scale['neck']
        != 1
    )
    assert (
        other.modulator.lr_scale['others']
        == wrapper.modulator.lr_scale['others']
        != 1
    )
    assert other.modulator.lr_scale['roi_head'] == 1
    assert math.isnan(other.modulator.history[0][1][0])
    # every parameter has its own moments, although the groups differ
    ours, theirs = dict(model.named_parameters()), wrapper.optimizer.state
    for name, param in other_model.named_parameters():
        assert torch.equal(
            other.optimizer.state[param]['exp_avg_sq'],
            theirs[ours[name]]['exp_avg_sq'],
        )


@pytest.mark.parametrize('paramwise_cfg', [None, dict(bias_lr_mult=2.0)])
def test_checkpoint_of_a_plain_optimizer(paramwise_cfg, tmp_path, log):
    """MMEngine's one group, or its group for each parameter."""
    model = make_model()
    model.backbone[0].requires_grad_(False)
    cfg = wrapper_cfg('AdamW')
    plain = build_optim_wrapper(
        model, dict(optimizer=cfg['optimizer'], paramwise_cfg=paramwise_cfg)
    )
    train(model, plain, 3)
    for group in plain.param_groups:
        group['lr'] *= 0.1  # as after a decay
    saved = through_a_file(plain.state_dict(), tmp_path)

    other = make_model()
    other.backbone[0].requires_grad_(False)
    wrapper = build_optim_wrapper(
        other, wrapper_cfg('AdamW', paramwise_cfg=paramwise_cfg)
    )
    wrapper.load_state_dict(saved)
    assert f'the lr_scale of {list(MODULES)} starts at 1' in log[-1]
    assert set(wrapper.modulator.lr_scale.values()) == {1.0}
    plain_lr = {
        param: group['lr']
        for group in plain.optimizer.param_groups
        for param in group['params']
    }
    for (name, param), twin in zip(
        model.named_parameters(), other.parameters()
    ):
        if not param.requires_grad:
            continue
        assert torch.equal(
            wrapper.optimizer.state[twin]['exp_avg'],
            plain.optimizer.state[param]['exp_avg'],
        ), name
        lr = next(
            group['lr']
            for group in wrapper.optimizer.param_groups
            if any(p is twin for p in group['params'])
        )
        assert lr == plain_lr[param]
    assert wrapper.param_groups[-1]['lr'] == pytest.approx(0.001)


def test_another_anchor_on_resume_starts_at_one():
    _, wrapper = trained()
    other = build_optim_wrapper(make_model(), wrapper_cfg(anchor='neck'))
    other.load_state_dict(wrapper.state_dict())
    assert wrapper.modulator.lr_scale['neck'] != 1
    assert other.modulator.lr_scale['neck'] == 1


def test_group_that_was_frozen_joins_the_schedule():
    """Its learning rate is decayed like that of the others."""
    model = make_model()
    model.neck.requires_grad_(False)
    wrapper = build_optim_wrapper(model, wrapper_cfg())
    for group in wrapper.param_groups:
        group['initial_lr'], group['lr'] = group['lr'], group['lr'] * 0.1
    other = build_optim_wrapper(make_model(), wrapper_cfg())
    other.load_state_dict(wrapper.state_dict())
    lrs = {g['module']: g['lr'] for g in other.optimizer.param_groups}
    assert lrs['neck'] == pytest.approx(0.005)
    assert len(set(lrs.values())) == 1


def test_updates_of_a_plain_checkpoint_count_from_its_iteration():
    model = make_model()
    wrapper = build_optim_wrapper(model, wrapper_cfg(accumulative_counts=2))
    wrapper.initialize_count_status(model, 100, 200)
    assert wrapper.agvm.update == 50


def test_checkpoint_of_another_model_is_refused():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, wrapper = trained(updates=0)
    with pytest.raises(ValueError, match='2 parameters without names'):
        wrapper.load_state_dict(optimizer.state_dict())


# -- from a run that another constructor grouped


def by_depth(model):
    """Groups as a layer-wise decay of mmdet makes them: named."""
    groups = {}
    for name, param in model.named_parameters():
        depth = name.count('.')
        group = groups.setdefault(
            (depth, param.ndim),
            dict(
                params=[],
                param_names=[],
                group_name=f'layer_{depth}',
                lr=0.01 * 0.5**depth,
                weight_decay=0.1 if param.ndim == 2 else 0.0,
            ),
        )
        group['params'].append(param)
        group['param_names'].append(name)
    return list(groups.values())


def plain_run(groups_of):
    """A model and a plain wrapper of AdamW after three updates."""
    model = make_model()
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.01)
    wrapper = OptimWrapper(optimizer)
    train(model, wrapper, 3)
    return model, wrapper


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ByDepth(DefaultOptimWrapperConstructor):
    def add_params(self, params, module, **kwargs):
        assert self.paramwise_cfg['decay_rate'] == 0.5
        params.extend(by_depth(module))


def test_layer_wise_decay_goes_on_at_each_parameters_own_rate(tmp_path):
    model, plain = plain_run(by_depth)
    for group in plain.param_groups:
        group['lr'] *= 0.1  # as after a decay
    saved = through_a_file(plain.state_dict(), tmp_path)
    other = make_model()
    wrapper = build_optim_wrapper(
        other,
        wrapper_cfg(
            'AdamW',
            paramwise_cfg=dict(decay_rate=0.5),
            base_constructor='ByDepth',
        ),
    )
    wrapper.load_state_dict(saved)
    names = {p: n for n, p in other.named_parameters()}
    rates = {
        names[param]: (group['lr'], group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for param in group['params']
    }
    assert rates == {
        name: (group['lr'], group['weight_decay'])
        for group in plain.optimizer.param_groups
        for name in group['param_names']
    }
    ours = dict(model.named_parameters())
    for name, param in other.named_parameters():
        assert torch.equal(
            wrapper.optimizer.state[param]['exp_avg'],
            plain.optimizer.state[ours[name]]['exp_avg'],
        )


def test_rates_that_one_group_cannot_keep_are_refused(tmp_path):
    _, plain = plain_run(by_depth)
    saved = through_a_file(plain.state_dict(), tmp_path)
    wrapper = build_optim_wrapper(make_model(), wrapper_cfg('AdamW'))
    with pytest.raises(
        ValueError,
        match=r'decay=0.1 for .* one parameter group.*base_construct',
    ):
        wrapper.load_state_dict(saved)


def three_groups(model):
    """As YOLO trainers make them: without names, in an order of their own."""
    weights = [p for p in model.parameters() if p.ndim == 2]
    biases = [p for p in model.parameters() if p.ndim < 2]
    return [
        dict(params=biases[:3], weight_decay=0.0),
        dict(params=weights),
        dict(params=biases[3:], weight_decay=0.0),
    ]


def backwards(model):
    """One group without names, in another order than the model's."""
    return list(model.parameters())[::-1]


@pytest.mark.parametrize(
    'groups_of, message',
    [
        (three_groups, 'without names in 3 groups .*another constructor'),
        (backwards, 'of other shapes, such as where backbone.0.weight'),
    ],
)
def test_parameters_without_names_are_never_guessed(
    groups_of, message, tmp_path
):
    _, plain = plain_run(groups_of)
    saved = through_a_file(plain.state_dict(), tmp_path)
    model = make_model()
    wrapper = build_optim_wrapper(model, wrapper_cfg('AdamW'))
    before = copy.deepcopy(wrapper.state_dict())
    with pytest.raises(ValueError, match=message):
        wrapper.load_state_dict(saved)
    assert wrapper.state_dict() == before


def test_state_of_another_shape_is_left_out_and_reported(tmp_path, log):
    """As of a head for other classes, whose name is the same."""
    model, wrapper = trained('AdamW')
    saved = through_a_file(wrapper.state_dict(), tmp_path)
    other = make_model()
    other.roi_head['bbox_head'] = torch.nn.Linear(5, 8).double()
    ours = build_optim_wrapper(
        other, wrapper_cfg('AdamW', accumulative_counts=2)
    )
    ours.load_state_dict(saved)
    (message,) = (line for line in log if 'another shape' in line)
    assert 'has 2 parameter(s) in another shape' in message
    assert 'roi_head.bbox_head.weight' in message
    state = ours.optimizer.state
    assert not state.get(other.roi_head['bbox_head'].weight)
    assert torch.equal(
        state[other.neck.weight]['exp_avg'],
        wrapper.optimizer.state[model.neck.weight]['exp_avg'],
    )
    train(other, ours, 6, accumulation=2, start=4)


def test_checkpoint_without_the_frozen_parameters_is_no_surprise(log):
    """As those are in which frozen parameters were left out of groups."""
    model = make_model()
    model.backbone[0].requires_grad_(False)
    model.neck.requires_grad_(False)
    cfg = wrapper_cfg('AdamW', accumulative_counts=2)
    wrapper = build_optim_wrapper(model, cfg)
    train(model, wrapper, 3, accumulation=2)
    state = wrapper.state_dict()
    kept, index = {}, 0
    groups = []
    for group in state['param_groups']:
        known = [
            (i, name)
            for i, name in zip(group['params'], group['param_names'])
            if dict(model.named_parameters())[name].requires_grad
        ]
        for i, _ in known:
            kept[index] = state['state'][i]
            index += 1
        if known:
            first = index - len(known)
            groups.append(
                {
                    **group,
                    'params': list(range(first, index)),
                    'param_names': [name for _, name in known],
                }
            )
    old = {**state, 'state': kept, 'param_groups': groups}
    other = build_optim_wrapper(model, cfg)
    other.load_state_dict(copy.deepcopy(old))
    assert not [line for line in log if 'does not contain' in line]
    assert not [line for line in log if 'other modules' in line]
    for param in model.parameters():
        ours, theirs = (
            w.optimizer.state.get(param, {}) for w in (other, wrapper)
        )
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key])


@pytest.mark.parametrize(
    'values, shape, fits',
    [
        (None, (4, 6), True),
        ({}, (4, 6), True),
        (dict(step=torch.tensor(3.0)), (4, 6), True),
        (dict(exp_avg=torch.ones(4, 6)), (4, 6), True),
        (dict(exp_avg=torch.ones(8, 6)), (4, 6), False),
        (dict(exp_avg=torch.ones(24)), (4, 6), False),
        # Adafactor's rows and columns
        (dict(row=torch.ones(4, 1), col=torch.ones(1, 6)), (4, 6), True),
        (dict(row=torch.ones(8, 1), col=torch.ones(1, 6)), (4, 6), False),
        # a projecting optimizer's
        (dict(exp_avg=torch.ones(2, 6), projector=object()), (4, 6), True),
        # a basis beside it
        (dict(exp_avg=torch.ones(4, 6), Q=[torch.eye(9)]), (4, 6), True),
    ],
)
def test_shapes_that_can_belong_to_a_parameter(values, shape, fits):
    assert _fits(values, torch.zeros(shape)) == fits


def renamed(state, old, new):
    """A saved state with other names of parameters."""
    state = copy.deepcopy(state)
    for group in state['param_groups']:
        group['param_names'] = [
            name.replace(old, new) for name in group['param_names']
        ]
    return state


def test_parameters_that_a_checkpoint_does_not_know_are_reported(log):
    _, wrapper = trained()
    state = renamed(wrapper.state_dict(), 'neck.', 'fpn.')
    model, other = trained(updates=0)
    other.load_state_dict(state)
    (warning,) = (line for line in log if 'does not contain' in line)
    assert 'not contain 2 of 13 parameters, such as neck.weight' in warning
    assert not other.optimizer.state.get(model.neck.weight)
    assert other.optimizer.state[model.rpn_head.weight]
    with pytest.raises(ValueError, match='has none of .*load_from'):
        other.load_state_dict(renamed(wrapper.state_dict(), '', 'old.'))


def test_history_is_bounded(monkeypatch):
    monkeypatch.setattr('mmagvm.core.modulator.HISTORY_LENGTH', 3)
    _, wrapper = trained(updates=5)
    assert [update for update, _ in wrapper.modulator.history] == [2, 3, 4]


# -- torch >= 2.6 and what MMEngine saves


def history_buffer():
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    buffer.update(3.0)
    return buffer


def test_mmengines_own_checkpoint_loads_with_the_check_on(tmp_path):
    import numpy as np

    saved = dict(
        loss=history_buffer(), best=np.float64(0.5), count=np.int64(3)
    )
    loaded = through_a_file(saved, tmp_path)
    assert loaded['loss'].mean() == 2.0
    assert loaded['best'] == 0.5
    assert loaded['count'] == 3


def test_getattr_stays_closed(tmp_path):
    class Malicious(HistoryBuffer):
        def __reduce__(self):
            return getattr, (HistoryBuffer, '__init__')

    with pytest.raises(pickle.UnpicklingError, match='may be malicious'):
        through_a_file(dict(loss=Malicious()), tmp_path)


def test_saved_state_is_a_copy():
    model, wrapper = trained()
    state = copy.deepcopy(wrapper.state_dict()['agvm'])
    live = wrapper.state_dict()['agvm']
    train(model, wrapper, 6, accumulation=2, start=4)
    assert live == state
