"""Mixed precision: a real loss scaler and bfloat16, both on the CPU."""

from unittest import mock

import pytest
import torch
from commands import load_command
from mmengine.config import Config
from mmengine.config.lazy import LazyObject
from mmengine.optim import build_optim_wrapper
from toy import make_batch, make_model, train, wrapper_cfg

from mmagvm import AGVMAmpOptimWrapper, AGVMOptimWrapper

HOST = 'mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available'


def amp_wrapper(model, optimizer='SGD', scaled=True, **settings):
    """An AMP wrapper with torch's loss scaler for CPUs.

    MMEngine asks for a GPU first; beyond that nothing here needs one. Autocast
    leaves the toy's float64 alone, so that only the scale can matter.
    """
    settings = {**dict(accumulative_counts=2, ema_decay=0.5), **settings}
    cfg = wrapper_cfg(optimizer, **settings)
    cfg.update(type='AGVMAmpOptimWrapper', dtype='bfloat16')
    with mock.patch(HOST, return_value=True):
        wrapper = build_optim_wrapper(model, cfg)
    assert isinstance(wrapper, AGVMAmpOptimWrapper)
    if scaled:
        wrapper.loss_scaler = torch.amp.GradScaler('cpu', init_scale=2.0**14)
    return wrapper


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
@pytest.mark.parametrize('clip_grad', [None, dict(max_norm=0.5)])
def test_scaled_training_equals_unscaled(estimator, optimizer, clip_grad):
    """A loss scale of a power of two changes no digit of float64 training."""
    settings = dict(interval=2, estimator=estimator, clip_grad=clip_grad)
    scaled, plain = make_model(), make_model()
    wrapper = amp_wrapper(scaled, optimizer, **settings)
    plain_wrapper = build_optim_wrapper(
        plain,
        wrapper_cfg(
            optimizer, accumulative_counts=2, ema_decay=0.5, **settings
        ),
    )
    for model, optim in ((scaled, wrapper), (plain, plain_wrapper)):
        train(model, optim, 6, accumulation=2)
    assert wrapper.modulator.measured >= 2
    assert wrapper.modulator.lr_scale == pytest.approx(
        plain_wrapper.modulator.lr_scale, rel=1e-9
    )
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(
            scaled.state_dict()[name], weight, rtol=1e-9, atol=1e-11
        )


def test_skipped_update_does_not_count():
    model = make_model()
    wrapper = amp_wrapper(model, interval=2)
    train(model, wrapper, 2, accumulation=2)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    scale = dict(wrapper.modulator.lr_scale)
    for micro_batch in range(2):
        with wrapper.optim_context(model):
            loss = model(make_batch(2, 0, micro_batch))
        wrapper.update_params(loss * float('inf'))
    assert wrapper.agvm.update == 2
    assert wrapper.modulator.skipped == 1
    assert wrapper.modulator.lr_scale == scale
    for name, weight in weights.items():
        assert torch.equal(model.state_dict()[name], weight)
    train(model, wrapper, 3, accumulation=2, start=2)
    assert [update for update, _ in wrapper.modulator.history] == [0, 2]


def test_scaler_and_agvm_travel_together():
    model = make_model()
    wrapper = amp_wrapper(model, interval=1)
    train(model, wrapper, 3, accumulation=2)
    state = wrapper.state_dict()
    other = amp_wrapper(make_model(), interval=1)
    other.load_state_dict(state)
    assert other.loss_scaler.state_dict() == wrapper.loss_scaler.state_dict()
    assert other.modulator.lr_scale == wrapper.modulator.lr_scale
    assert other.agvm.update == 3


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_bfloat16_is_measured_like_float32(estimator):
    phis = []
    for amp in (True, False):
        model = make_model().float()
        settings = dict(interval=1, estimator=estimator)
        if amp:
            wrapper = amp_wrapper(model, scaled=False, **settings)
        else:
            wrapper = build_optim_wrapper(
                model, wrapper_cfg(accumulative_counts=2, **settings)
            )
        for micro_batch in range(2):
            with wrapper.optim_context(model):
                loss = model(make_batch(0, 0, micro_batch).float())
            wrapper.update_params(loss)
        phis.append(wrapper.modulator.variance)
    assert phis[0] != phis[1]
    assert phis[0] == pytest.approx(phis[1], abs=0.05)


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_large_loss_scale_is_measured_like_none(estimator, optimizer):
    """In bfloat16 nothing overflows, and the scale doubles again and again."""
    wrappers = []
    for scale in (1.0, 2.0**70):
        model = make_model().float()
        wrapper = amp_wrapper(
            model,
            optimizer,
            interval=1,
            estimator=estimator,
            clip_grad=dict(max_norm=0.5),
        )
        wrapper.loss_scaler = torch.amp.GradScaler('cpu', init_scale=scale)
        for micro_batch in range(6):
            with wrapper.optim_context(model):
                loss = model(make_batch(0, 0, micro_batch).float())
            wrapper.update_params(loss)
        wrappers.append(wrapper)
    plain, scaled = wrappers
    assert scaled.modulator.skipped == 0
    assert scaled.modulator.measured == plain.modulator.measured >= 2
    assert scaled.modulator.variance == plain.modulator.variance
    assert scaled.agvm.noise_scale == plain.agvm.noise_scale


def test_several_optimizers_have_no_amp_switch():
    cfg = Config(dict(optim_wrapper=dict(first=dict(optimizer={}))))
    with pytest.raises(ValueError, match=r"--amp: .* several, \['first'\]"):
        load_command('train.py').enable_amp(cfg)
    assert 'type' not in cfg.optim_wrapper


@pytest.mark.parametrize(
    'kind',
    [
        AGVMOptimWrapper,
        'mmagvm.engine.optim_wrapper.AGVMOptimWrapper',
        LazyObject('mmagvm.engine', 'AGVMOptimWrapper'),
    ],
    ids=['class', 'dumped', 'lazy'],
)
def test_amp_switch_knows_types_that_are_no_names(kind):
    cfg = Config(dict(optim_wrapper=dict(type=kind, optimizer={})))
    load_command('train.py').enable_amp(cfg)
    assert cfg.optim_wrapper.type == 'AGVMAmpOptimWrapper'


def test_amp_switch_names_a_class_it_does_not_know():
    cfg = Config(dict(optim_wrapper=dict(type=Config, optimizer={})))
    with pytest.raises(ValueError, match="type='Config' has no mixed"):
        load_command('train.py').enable_amp(cfg)


@pytest.mark.parametrize('setting', [None, {}, dict(base_batch_size=None)])
def test_auto_scale_lr_needs_a_base(setting):
    cfg = Config(dict(auto_scale_lr=setting))
    with pytest.raises(ValueError, match='no auto_scale_lr.base_batch_size'):
        load_command('train.py').enable_auto_scale_lr(cfg)
