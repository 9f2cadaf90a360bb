"""The wrapper in one process: refusals, steps, micro-batches."""

from collections import OrderedDict

import pytest
import torch
from benchmarks.counters import Profile
from mmengine.optim import MultiStepLR, OptimWrapper, build_optim_wrapper
from oracle import Oracle
from torch import nn
from toy import make_batch, make_model, train, wrapper_cfg

from mmagvm import AGVMOptimWrapper
from mmagvm.core.grad_variance import Measurement


def build(model=None, optimizer='SGD', accumulative_counts=2, **settings):
    return build_optim_wrapper(
        make_model() if model is None else model,
        wrapper_cfg(
            optimizer, accumulative_counts=accumulative_counts, **settings
        ),
    )


# -- refusals, each by its message


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(interval=0), 'interval=0 .*write 1 or more'),
        (dict(ema_decay=1.0), 'ema_decay=1.0 .*from 0 to below 1'),
        (dict(ema_decay=-0.1), 'ema_decay=-0.1 .*from 0 to below 1'),
        (dict(interval='5'), "interval='5' .*write 1 or more"),
        (dict(interval=2.5), 'interval=2.5 .*write 1 or more'),
        (dict(begin=1.5), 'begin=1.5 .*write 0 or more'),
        (dict(end='100'), "end='100' .*after begin"),
        (dict(ema_decay=None), 'ema_decay=None .*from 0 to below 1'),
        (dict(eps=float('inf')), 'eps=inf .*write 0 or more'),
        (dict(ratio_range=0.5), 'ratio_range=0.5 .*around 1'),
        (dict(ratio_range=['0.1', '10']), 'ratio_range=.*around 1'),
        (dict(estimator=['split']), r"estimator=\['split'\] .*write 'split'"),
        (dict(modulate='no'), "modulate='no' .*True or False"),
        (dict(modules='backbone'), "modules='backbone' .*write a list"),
        (dict(modules=['neck', 'neck']), 'modules=.*each once'),
        (dict(begin=-1), 'begin=-1 .*write 0 or more'),
        (dict(begin=5, end=5), 'end=5 .*after begin=5'),
        (
            dict(estimator='guess'),
            "estimator='guess' .*write 'split' or 'pairs'",
        ),
        (dict(comm_hook='fp8'), "comm_hook='fp8' .*'fp16', 'bf16' or None"),
        (dict(eps=-1.0), 'eps=-1.0 .*write 0 or more'),
        (dict(ratio_range=(3.0, 2.0)), r'ratio_range=\(3.0, 2.0\) .*around 1'),
        (dict(ratio_range=(2.0, 3.0)), r'ratio_range=\(2.0, 3.0\) .*around 1'),
        (dict(ratio_range=(1.0,)), r'ratio_range=\(1.0,\) .*around 1'),
        (dict(anchor='spine'), r"anchor='spine' .*\['backbone', 'neck'"),
        (dict(restart_at_lr_drop=0.5), 'restart_at_lr_drop=0.5 .*True or Fal'),
        (
            dict(restart_at_lr_drop=True, ema_decay=0),
            'restart_at_lr_drop=True .*write a higher ema_decay',
        ),
        (
            dict(bound_by_grad_norm=True, ema_decay=0, estimator='pairs'),
            'bound_by_grad_norm=True .*write a higher ema_decay',
        ),
        (
            dict(restart_at_lr_drop=True, ema_decay='0.9'),
            "ema_decay='0.9' .*from 0 to below 1",
        ),
        (
            dict(bound_by_grad_norm=True, estimator='split'),
            "bound_by_grad_norm=True .*write estimator='pairs'",
        ),
    ],
)
def test_wrong_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_frozen_anchor_is_refused():
    model = make_model()
    for param in model.backbone.parameters():
        param.requires_grad = False
    with pytest.raises(ValueError, match=r"anchor='backbone'.*\['neck', "):
        build(model)
    assert build(model, anchor='neck').modulator.anchor == 'neck'


def test_other_constructor_is_refused():
    cfg = dict(wrapper_cfg(), constructor='DefaultOptimWrapperConstructor')
    with pytest.raises(
        ValueError, match="constructor='AGVMOptimWrapperConstructor'"
    ):
        build_optim_wrapper(make_model(), cfg)


def test_one_rank_without_accumulation_is_refused_at_set_up():
    wrapper = build(accumulative_counts=1)
    with pytest.raises(ValueError, match='accumulative_counts=1 .*2 or more'):
        wrapper.initialize_count_status(make_model(), 0, 10)


@pytest.mark.parametrize(
    'name',
    [
        'FullyShardedDataParallel',
        'DeepSpeedEngine',
        'MMDeepSpeedEngineWrapper',
    ],
)
def test_sharding_wrappers_are_refused_by_name(name):
    model = type(name, (nn.Module,), {})()
    with pytest.raises(ValueError, match=f'does not support {name}'):
        build().initialize_count_status(model, 0, 10)
    model.module = make_model()  # wrapped before the optimizer is built
    with pytest.raises(
        ValueError, match=f'does not support {name}.*FullyShard'
    ):
        build_optim_wrapper(model, wrapper_cfg())


def sharded_layer():
    return type('MMFullyShardedDataParallel', (FullySharded,), {})()


class FullySharded(nn.Linear):
    """A class with the name of torch's."""

    def __init__(self):
        super().__init__(5, 5)


FullySharded.__name__ = 'FullyShardedDataParallel'


class Engine:
    """Like MMEngine's engine wrappers: not a module, but with one in it."""

    def __init__(self, model):
        self.engine = model

    def __getattr__(self, name):
        return getattr(self.engine, name)


def test_sharded_parts_are_refused_too():
    model = make_model()
    model.neck = nn.Sequential(model.neck, nn.Sequential(sharded_layer()))
    message = 'does not support FullyShardedDataParallel'
    for wrapped in (model, torch.compile(model), Engine(model)):
        with pytest.raises(ValueError, match=message):
            build_optim_wrapper(wrapped, wrapper_cfg())
        with pytest.raises(ValueError, match=message):
            build().initialize_count_status(wrapped, 0, 10)
    model.neck[1].requires_grad_(False)  # as a teacher's are
    build(model).initialize_count_status(model, 0, 10)


class Ahead(torch.optim.Optimizer):
    """Steps by another optimizer, as Lookahead does."""

    def __init__(self, optimizer):
        self.inner = [optimizer]
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state
        self.defaults = optimizer.defaults
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()

    def step(self):
        self.inner[0].step()


def test_optimizer_in_an_optimizer_is_seen():
    model = make_model()
    inner = build(model).optimizer
    wrapper = AGVMOptimWrapper(Ahead(inner), accumulative_counts=2, interval=1)
    train(model, wrapper, 3, accumulation=2)
    assert wrapper.agvm.update == wrapper.modulator.measured == 3
    assert not wrapper.agvm.missed
    zero = type('ZeroRedundancyOptimizer', (torch.optim.SGD,), {})
    inner = zero(inner.param_groups, lr=0.1)
    with pytest.raises(ValueError, match='support ZeroRedundancyOptimizer'):
        AGVMOptimWrapper(Ahead(inner), accumulative_counts=2)


def test_compiled_model_is_opened():
    """Its parameters' names do not show the compiler."""
    model = make_model()
    compiled = torch.compile(model, backend='eager')
    wrapper = build(compiled, interval=1)
    assert wrapper.modulator.modules == build().modulator.modules
    assert list(wrapper.parameters) == [n for n, _ in model.named_parameters()]
    train(compiled, wrapper, 2, accumulation=2)
    assert wrapper.modulator.measured == 2


def test_sparse_gradients_of_functions_are_refused():
    model = make_model()
    wrapper = build(model, begin=3)
    with pytest.raises(ValueError, match='which neck.weight has: set sparse'):
        with wrapper.optim_context(model):
            rows = nn.functional.embedding(
                torch.tensor([0, 1]), model.neck.weight, sparse=True
            )
        wrapper.update_params(rows.sum())


def test_sparse_gradients_are_refused():
    model = make_model()
    model.neck.embedding = nn.Embedding(2, 3, sparse=True)
    wrapper = build_optim_wrapper(model, wrapper_cfg(accumulative_counts=2))
    with pytest.raises(ValueError, match='sparse=False .*neck.embedding'):
        wrapper.initialize_count_status(model, 0, 10)
    model.neck.embedding.requires_grad_(False)
    wrapper.initialize_count_status(model, 0, 10)


def test_noise_scale_outlives_another_batch():
    """It is in images, for any number of images in a sample."""
    saved, resumed = build(), build()
    saved.agvm.set_batch(
        dict(ranks=4, images_per_rank=2, accumulative_counts=3)
    )
    phi, signal, noise = (torch.full((6,), v) for v in (0.5, 2.0, 3.0))
    saved.modulator.update(0, Measurement(phi, True, signal, noise))
    assert saved.agvm.noise_scale['neck'] == pytest.approx(6 * 3 / 2)
    resumed.load_state_dict(saved.state_dict())
    resumed.agvm.set_batch(
        dict(ranks=1, images_per_rank=16, accumulative_counts=5)
    )
    assert resumed.agvm.noise_scale == pytest.approx(saved.agvm.noise_scale)
    assert resumed.modulator.noise_scale['neck'] == pytest.approx(9 / 16)


def test_optimizer_without_lr_is_refused():
    model = make_model()
    groups = [dict(params=list(model.parameters()), module='backbone')]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    optimizer.param_groups[0]['lr'] = None
    with pytest.raises(ValueError, match='no learning rate'):
        AGVMOptimWrapper(optimizer)


# -- against the oracle


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
@pytest.mark.parametrize('accumulation', [2, 3, 4])
@pytest.mark.parametrize('idle_head', [False, True])
@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_micro_batches_equal_the_oracle(
    optimizer, accumulation, idle_head, estimator
):
    settings = dict(interval=2, ema_decay=0.5, estimator=estimator)
    model = make_model(idle_head=idle_head)
    wrapper = build(model, optimizer, accumulation, **settings)
    train(model, wrapper, 6, accumulation=accumulation)

    oracle = Oracle(
        make_model(idle_head=idle_head),
        make_batch,
        accumulation=accumulation,
        optimizer=optimizer,
        **settings,
    )
    for _ in range(6):
        oracle.update()
    # `pairs` waits for AdamW's second moment
    waits = estimator == 'pairs' and optimizer == 'AdamW'
    assert wrapper.modulator.measured == (2 if waits else 3)
    assert wrapper.modulator.lr_scale == pytest.approx(oracle.mu, rel=1e-9)
    assert max(abs(mu - 1) for mu in oracle.mu.values()) > 0.05
    for name, weight in oracle.model.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[name], weight, rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize('max_norm', [0.05, 1e6])
@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_clipped_training_equals_the_oracle(optimizer, max_norm):
    settings = dict(interval=1, ema_decay=0.5)
    model = make_model()
    clip_grad = dict(max_norm=max_norm)
    wrapper = build(model, optimizer, clip_grad=clip_grad, **settings)
    train(model, wrapper, 6, accumulation=2)
    oracle = Oracle(
        make_model(),
        make_batch,
        accumulation=2,
        optimizer=optimizer,
        max_norm=max_norm,
        **settings,
    )
    for _ in range(6):
        oracle.update()
    assert wrapper.modulator.lr_scale == pytest.approx(oracle.mu, rel=1e-6)
    for name, weight in oracle.model.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[name], weight, rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize('norm_type', ['inf', 1])
def test_every_norm_that_torch_clips_by_is_measured(norm_type):
    model = make_model()
    wrapper = build(
        model,
        'AdamW',
        interval=1,
        estimator='split',
        clip_grad=dict(max_norm=1e-3, norm_type=norm_type),
    )
    train(model, wrapper, 3, accumulation=2)
    assert wrapper.modulator.measured == 3
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    divisor = wrapper.agvm._clip_divisor(wrapper.clip_grad_kwargs)
    before = wrapper.agvm._grad_variance.grad_norm(float(norm_type))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3, float(norm_type))
    after = wrapper.agvm._grad_variance.grad_norm(float(norm_type))
    assert (before / after).item() == pytest.approx(divisor.item(), rel=1e-5)


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_slices_make_no_difference(estimator, optimizer, monkeypatch):
    settings = dict(interval=1, estimator=estimator)
    wrappers = []
    for size in (1, 100, 2**20):
        monkeypatch.setattr('mmagvm.core.grad_variance.base.SLICE', size)
        model = make_model()
        wrappers.append(build(model, optimizer, **settings))
        train(model, wrappers[-1], 3, accumulation=2)
    for wrapper in wrappers:
        assert wrapper.modulator.measured >= 2
        assert wrapper.modulator.lr_scale == pytest.approx(
            wrappers[0].modulator.lr_scale, rel=1e-12
        )


class Large(nn.Module):
    """Two modules of eight parameters of 1 MiB each."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(*(self._layer() for _ in range(8)))
        self.head = nn.Sequential(*(self._layer() for _ in range(8)))

    @staticmethod
    def _layer():
        return nn.Linear(512, 512, bias=False)

    def forward(self, x):
        return self.head(self.backbone(x)).square().mean()


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_measuring_needs_one_copy_of_the_gradients(
    estimator, optimizer, monkeypatch
):
    monkeypatch.setattr('mmagvm.core.grad_variance.base.SLICE', 2**20)
    model = Large()
    wrapper = build(model, optimizer, interval=2, estimator=estimator, begin=2)
    peaks = []
    for _ in range(4):
        with Profile() as seen:
            for _ in range(2):
                with wrapper.optim_context(model):
                    loss = model(torch.randn(2, 512))
                wrapper.update_params(loss)
        peaks.append(seen.peak_bytes / 2**20)
    assert wrapper.modulator.measured == 1
    assert peaks[1] == pytest.approx(peaks[3], abs=1)
    assert peaks[2] - peaks[3] < 16 + 5, peaks


def test_begin_end_and_interval_count_updates():
    model = make_model()
    wrapper = build(model, begin=3, end=9, interval=2)
    train(model, wrapper, 12, accumulation=2)
    assert [update for update, _ in wrapper.modulator.history] == [3, 5, 7]
    assert wrapper.agvm.update == 12


def test_incomplete_last_accumulation_updates_unmeasured():
    model = make_model()
    wrapper = build(model, accumulative_counts=3, interval=1)
    wrapper.initialize_count_status(model, 0, 7)  # updates of 3, 3 and 1
    for iteration in range(7):
        with wrapper.optim_context(model):
            loss = model(make_batch(iteration, 0, 0))
        wrapper.update_params(loss)
    assert wrapper.agvm.update == 3
    assert [update for update, _ in wrapper.modulator.history] == [0, 1]


def test_optimizer_without_second_moment_is_measured_raw(log):
    model = make_model()
    cfg = wrapper_cfg(accumulative_counts=2, interval=1)
    cfg['optimizer'] = dict(type='RMSprop', lr=0.01)
    wrapper = build_optim_wrapper(model, cfg)
    train(model, wrapper, 4, accumulation=2)
    assert wrapper.modulator.measured == 4
    assert len([m for m in log if 'measured on raw gradients' in m]) == 1


class Adan(torch.optim.SGD):
    """Keeps a second moment of differences of gradients, with a third beta."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            group.update(betas=(0.98, 0.92, 0.99), eps=1e-8)

    def step(self):
        super().step()
        for group in self.param_groups:
            for param in group['params']:
                self.state[param]['exp_avg_sq'] = torch.rand_like(param)


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_second_moment_of_something_else_is_measured_raw(estimator, log):
    wrappers = []
    for optimizer in (dict(type=Adan, lr=0.05), dict(type='SGD', lr=0.05)):
        model = make_model()
        cfg = wrapper_cfg(
            accumulative_counts=2, interval=1, estimator=estimator
        )
        cfg['optimizer'] = optimizer
        wrappers.append(build_optim_wrapper(model, cfg))
        train(model, wrappers[-1], 3, accumulation=2)
    adan, sgd = wrappers
    assert adan.modulator.variance == sgd.modulator.variance
    assert len([m for m in log if 'measured on raw gradients' in m]) == 1


# -- equal variances: the plain optimizer, bit for bit


class Twins(nn.Module):
    """Two modules that always have the same gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Linear(6, 3)
        self.head = nn.Linear(6, 3)
        self.head.load_state_dict(self.backbone.state_dict())

    def forward(self, x):
        return (self.backbone(x) + self.head(x)).sin().mean()


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_equal_variances_train_like_the_plain_optimizer(optimizer):
    agvm, plain = Twins(), Twins()
    wrapper = build(agvm, optimizer, interval=1)
    plain_wrapper = build_optim_wrapper(
        plain,
        dict(
            optimizer=wrapper_cfg(optimizer)['optimizer'],
            accumulative_counts=2,
        ),
    )
    for model, optim in ((agvm, wrapper), (plain, plain_wrapper)):
        for iteration in range(20):
            with optim.optim_context(model):
                loss = model(make_batch(iteration, 0, 0).float())
            optim.update_params(loss)
    assert type(plain_wrapper) is OptimWrapper
    assert wrapper.modulator.measured == 10
    assert set(wrapper.modulator.lr_scale.values()) == {1.0}
    assert (
        0
        < wrapper.modulator.variance['head']
        == wrapper.modulator.variance['backbone']
    )
    for name, weight in plain.state_dict().items():
        assert torch.equal(agvm.state_dict()[name], weight)


# -- the learning rate afterwards


def lrs(wrapper):
    return [group['lr'] for group in wrapper.optimizer.param_groups]


def test_lr_is_scaled_in_the_step_and_restored():
    model = make_model()
    wrapper = build(model, interval=1, ema_decay=0.0)
    seen = []
    wrapper.optimizer.register_step_pre_hook(
        lambda *_: seen.append(lrs(wrapper))
    )
    lr = 0.1 + 0.2  # no short binary fraction: dividing would not restore it
    for group in wrapper.optimizer.param_groups:
        group['lr'] = lr
    train(model, wrapper, 3, accumulation=2)
    assert lrs(wrapper) == [lr] * 6
    assert seen[-1] == [lr * mu for mu in wrapper.modulator.lr_scale.values()]
    assert len(set(seen[-1])) > 1


def test_lr_is_restored_when_the_step_raises():
    model = make_model()
    wrapper = build(model, interval=1, ema_decay=0.0)
    train(model, wrapper, 1, accumulation=2)
    before = lrs(wrapper)

    def fail(*_):
        assert lrs(wrapper) != before
        raise RuntimeError('out of memory')

    wrapper.optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match='out of memory'):
        train(model, wrapper, 2, accumulation=2, start=1)
    assert lrs(wrapper) == before
    assert wrapper.agvm.update == 1


def test_tensor_lr_is_restored_as_the_same_object():
    model = make_model()
    wrapper = build(model, interval=1, ema_decay=0.0)
    tensors = [torch.tensor(0.05) for _ in wrapper.optimizer.param_groups]
    for group, lr in zip(wrapper.optimizer.param_groups, tensors):
        group['lr'] = lr
    train(model, wrapper, 3, accumulation=2)
    assert all(a is b for a, b in zip(lrs(wrapper), tensors))
    assert all(lr.item() == torch.tensor(0.05).item() for lr in tensors)


def test_multi_step_lr_never_sees_the_multiplier():
    rates = []
    for modulated in (True, False):
        model = make_model()
        cfg = wrapper_cfg(accumulative_counts=2, interval=1, ema_decay=0.0)
        if not modulated:
            cfg = dict(optimizer=cfg['optimizer'], accumulative_counts=2)
        wrapper = build_optim_wrapper(model, cfg)
        scheduler = MultiStepLR(wrapper, milestones=[2, 4], by_epoch=False)
        rates.append([])
        for update in range(6):
            train(model, wrapper, update + 1, accumulation=2, start=update)
            scheduler.step()
            rates[-1].append(set(lrs(wrapper)))
    assert rates[0] == rates[1]
    assert all(len(step) == 1 for step in rates[0])


# -- gradients that cannot be measured


def test_nan_leaves_lr_scale_as_it_was(log):
    model = make_model()
    wrapper = build(model, interval=1)
    train(model, wrapper, 2, accumulation=2)
    before = dict(wrapper.modulator.lr_scale), dict(wrapper.modulator.variance)
    with wrapper.optim_context(model):
        loss = model(make_batch(2, 0, 0))
    wrapper.update_params(loss)
    with wrapper.optim_context(model):
        loss = model(make_batch(2, 0, 1)) * float('nan')
    wrapper.update_params(loss)
    assert (wrapper.modulator.lr_scale, wrapper.modulator.variance) == before
    assert (wrapper.modulator.measured, wrapper.modulator.skipped) == (2, 1)
    assert 'update 2 has gradients that are NaN or infinite' in log[-1]


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_module_without_gradient_keeps_its_multiplier(estimator):
    model = make_model()
    wrapper = build(model, interval=1, estimator=estimator)
    train(model, wrapper, 2, accumulation=2)
    before = wrapper.modulator.lr_scale['neck']
    for param in model.neck.parameters():
        param.requires_grad = False  # frozen later, as some hooks do
    others = dict(wrapper.modulator.lr_scale)
    train(model, wrapper, 4, accumulation=2, start=2)
    assert wrapper.modulator.measured == 4
    assert wrapper.modulator.lr_scale['neck'] == before
    assert wrapper.modulator.lr_scale['rpn_head'] != others['rpn_head']
    model.neck.requires_grad_(True)  # and thawed again
    train(model, wrapper, 6, accumulation=2, start=4)
    assert wrapper.modulator.lr_scale['neck'] != before


# -- a model that is wrapped again


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, inputs):
        return self.module(inputs)


def test_model_that_is_wrapped_again_is_followed():
    model = make_model()
    wrapper = build_optim_wrapper(
        model, wrapper_cfg(accumulative_counts=2, interval=1)
    )
    wrapped = Wrapped(model)
    train(wrapped, wrapper, 1, accumulation=2)
    first = wrapper.agvm._grad_variance
    train(model, wrapper, 2, accumulation=2, start=1)  # inside of it
    assert wrapper.agvm._grad_variance is first
    again = Wrapped(model)
    train(again, wrapper, 3, accumulation=2, start=2)
    assert wrapper.agvm._grad_variance is not first
    assert wrapper.modulator.measured == 3


def test_model_is_not_exchanged_within_an_update():
    model = make_model()
    wrapper = build_optim_wrapper(
        model, wrapper_cfg(accumulative_counts=2, interval=1)
    )
    agvm = wrapper.agvm
    with wrapper.optim_context(model):
        loss = model(make_batch(0, 0, 0))
    wrapper.update_params(loss)
    first, again = agvm._grad_variance, Wrapped(model)
    with wrapper.optim_context(again):
        loss = again(make_batch(0, 0, 1))
    assert agvm._grad_variance is first
    wrapper.update_params(loss)
    assert wrapper.modulator.measured == 1
    with wrapper.optim_context(again):
        assert agvm._grad_variance is not first
