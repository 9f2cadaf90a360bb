"""Parameters that are frozen, and unfrozen while training runs."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from toy import MODULES, make_model, train, wrapper_cfg


def frozen_pair(frozen, updates, thaw_at, optimizer='AdamW', **settings):
    """A model trained with AGVM, and one with a plain OptimWrapper.

    ``frozen`` names what is frozen from the start to update ``thaw_at``.
    """
    models = []
    for plain in (False, True):
        model = make_model()
        model.get_submodule(frozen).requires_grad_(False)
        cfg = wrapper_cfg(optimizer, accumulative_counts=2, **settings)
        if plain:
            cfg = dict(
                optimizer=cfg['optimizer'],
                accumulative_counts=2,
                paramwise_cfg=settings.get('paramwise_cfg'),
            )
        wrapper = build_optim_wrapper(model, cfg)
        train(model, wrapper, thaw_at, accumulation=2)
        model.get_submodule(frozen).requires_grad_(True)
        train(model, wrapper, updates, accumulation=2, start=thaw_at)
        models.append((model, wrapper))
    return models


@pytest.mark.parametrize('paramwise_cfg', [None, dict(bias_lr_mult=2.0)])
@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
@pytest.mark.parametrize('frozen', ['backbone.0', 'neck'])
def test_unfrozen_layer_trains_as_in_mmengine(
    frozen, optimizer, paramwise_cfg
):
    (ours, _), (plain, _) = frozen_pair(
        frozen,
        6,
        3,
        optimizer,
        interval=1,
        modulate=False,
        paramwise_cfg=paramwise_cfg,
    )
    fresh = make_model().get_submodule(frozen).weight
    for name, weight in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    moved = not torch.equal(ours.get_submodule(frozen).weight, fresh)
    # with paramwise_cfg MMEngine leaves frozen parameters out of its groups
    assert moved == (paramwise_cfg is None)


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_unfrozen_layer_is_measured_with_its_module(estimator, log):
    settings = dict(interval=1, ema_decay=0.5, estimator=estimator)
    (model, wrapper), _ = frozen_pair(
        'backbone.0', 6, 3, 'SGD', paramwise_cfg=None, **settings
    )
    assert len(wrapper.modulator.history) == 6
    assert not any('was frozen' in line for line in log)
    # what an update measures of a backbone that was never frozen
    other = make_model()
    other.load_state_dict(model.state_dict())
    fresh = build_optim_wrapper(
        other, wrapper_cfg('SGD', accumulative_counts=2, **settings)
    )
    train(model, wrapper, 7, accumulation=2, start=6)
    train(other, fresh, 7, accumulation=2, start=6)
    for module in MODULES:
        assert wrapper.modulator.variance[module] == pytest.approx(
            fresh.modulator.variance[module], rel=1e-9
        )


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_module_that_was_frozen_steps_at_the_plain_rate_and_is_reported(
    optimizer, estimator, log
):
    (model, wrapper), _ = frozen_pair(
        'neck',
        6,
        3,
        optimizer,
        interval=1,
        ema_decay=0.5,
        estimator=estimator,
    )
    assert 'neck' not in wrapper.modulator.modules
    (message,) = (line for line in log if 'was frozen' in line)
    assert 'neck.weight (and 1 more) was frozen' in message
    assert 'at the plain learning rate' in message
    assert wrapper.modulator.measured >= 5
    lrs = []
    wrapper.optimizer.register_step_pre_hook(
        lambda optimizer, *_: lrs.append(
            {g['module']: g['lr'] for g in optimizer.param_groups}
        )
    )
    train(model, wrapper, 7, accumulation=2, start=6)
    lr = wrapper.optimizer.defaults['lr']
    scales = wrapper.modulator.lr_scale
    assert lrs[0].pop(None) == lr
    assert lrs[0] == {module: lr * scales[module] for module in scales}
    assert scales['rpn_head'] != 1


def test_left_out_parameter_that_is_unfrozen_is_reported(log):
    frozen_pair(
        'backbone.0', 6, 3, interval=1, paramwise_cfg=dict(bias_lr_mult=2.0)
    )
    (message,) = (line for line in log if 'was frozen' in line)
    assert 'backbone.0.weight (and 1 more)' in message
    assert 'in no parameter group' in message


def test_freezing_in_mid_training_leaves_lr_scale_alone():
    model = make_model()
    wrapper = build_optim_wrapper(
        model, wrapper_cfg(accumulative_counts=2, interval=1, ema_decay=0.5)
    )
    train(model, wrapper, 3, accumulation=2)
    before = dict(wrapper.modulator.lr_scale)
    weight = model.neck.weight.clone()
    model.neck.requires_grad_(False)
    train(model, wrapper, 6, accumulation=2, start=3)
    after = wrapper.modulator.lr_scale
    assert after['neck'] == before['neck'] != 1
    assert after['rpn_head'] != before['rpn_head']
    assert torch.equal(model.neck.weight, weight)
