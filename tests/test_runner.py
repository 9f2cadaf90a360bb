"""Training by MMEngine's Runner: what is logged, and what changes nothing."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from torch._dynamo.utils import counters
from toy import MODULES
from toy_runner import ITERATIONS, ToyModel, log_of, run, toy_cfg, train_lines

from mmagvm.analysis.run_log import load_run

# with both package sets
pytestmark = pytest.mark.host


@MODELS.register_module()
class NoSignal(ToyModel):
    """In later updates the gradients of the neck alternate in sign."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, inputs, mode='loss'):
        self.calls += 1
        loss = super().forward(inputs)['loss']
        if self.calls > 8:
            sign = 1 - 2 * (self.calls % 2)
            loss = sign * 100 * self.neck.weight.sum() + 0 * loss
            loss = loss + self.backbone(inputs).sum()
        return dict(loss=loss)


def test_one_learning_rate_for_all_stays_as_given(tmp_path):
    cfg = toy_cfg(tmp_path / 'run', max_epochs=1)
    cfg.param_scheduler = [
        dict(type='OneCycleLR', eta_max=0.5, total_steps=8, by_epoch=False)
    ]
    for line in train_lines(run(cfg)):
        assert line['base_lr'] == pytest.approx(line['lr'])


def test_every_module_is_logged_from_the_first_iteration(tmp_path):
    runner = run(toy_cfg(tmp_path / 'run', max_epochs=1))
    lines = train_lines(runner)
    assert [line['step'] for line in lines] == list(range(1, ITERATIONS + 1))
    for line in lines[:3]:  # update 1 ends with iteration 4
        assert {line[f'agvm_variance/{m}'] for m in MODULES} == {1.0}
        assert {line[f'agvm_lr_scale/{m}'] for m in MODULES} == {1.0}
    assert [line['agvm/measured'] for line in lines] == [
        0,
        0,
        0,
        1,
        1,
        2,
        2,
        3,
    ]
    wrapper = runner.optim_wrapper
    for module in MODULES:
        assert lines[-1][f'agvm_variance/{module}'] == pytest.approx(
            wrapper.modulator.variance[module]
        )
        assert lines[-1][f'agvm_lr_scale/{module}'] == pytest.approx(
            wrapper.modulator.lr_scale[module]
        )
    assert wrapper.modulator.lr_scale['neck'] != 1
    # the header shows the schedule's rate, not the multiplied one
    assert lines[-1]['lr'] == lines[-1]['base_lr']


@pytest.mark.parametrize('modules', ['backbone', ['backbone', 'neck']])
def test_activation_checkpointing_changes_nothing(tmp_path, modules):
    """MMEngine's setting, for inputs that need no gradient."""
    cfg = toy_cfg(tmp_path / 'checkpointed', max_epochs=1)
    cfg.activation_checkpointing = modules
    ours = run(cfg).model.state_dict()
    other = run(toy_cfg(tmp_path / 'plain', max_epochs=1)).model.state_dict()
    for name, weight in other.items():
        assert torch.equal(ours[name], weight)


def test_time_of_an_update_is_that_of_its_iterations(tmp_path):
    cfg = toy_cfg(tmp_path / 'run', max_epochs=1, interval=2)
    runner = run(cfg)
    lines = train_lines(runner)
    # every iteration, where MMEngine logs means over ten
    whole, data = (
        runner.message_hub.get_scalar(f'train/{name}').data[0]
        for name in ('time', 'data_time')
    )
    times = whole - data
    updates = [sum(times[i : i + 2]) for i in range(0, ITERATIONS, 2)]
    assert 'agvm_update_time/unmeasured' not in lines[0]  # not over yet
    assert 'agvm_update_time/measured' not in lines[2]
    last = {
        kind: lines[-1][f'agvm_update_time/{kind}']
        for kind in ('measured', 'unmeasured')
    }
    # updates 1 and 3 are measured
    assert last['measured'] == pytest.approx(updates[3])
    assert last['unmeasured'] == pytest.approx(updates[2])


def test_measuring_alone_changes_no_weight(tmp_path):
    """modulate=False, against plain MMEngine without mmagvm's hook."""
    measured = run(
        toy_cfg(tmp_path / 'measured', modulate=False, estimator='pairs')
    )
    cfg = toy_cfg(tmp_path / 'plain')
    cfg.optim_wrapper = dict(
        optimizer=cfg.optim_wrapper.optimizer, accumulative_counts=2
    )
    cfg.custom_hooks = []
    plain = run(cfg)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(measured.model.state_dict()[name], weight)
    last = train_lines(measured)[-1]
    for module in MODULES:
        assert (last[f'agvm_lr_scale/{module}'] != 1) == (module != 'backbone')
        assert last[f'agvm_variance/{module}'] != 1
        assert f'agvm_noise_scale/{module}' in last
    ours, theirs = (
        [(line['loss'], line['lr']) for line in train_lines(runner)]
        for runner in (measured, plain)
    )
    assert ours == theirs


def test_averaged_weights_change_nothing(tmp_path):
    """EMAHook copies the model, and swaps weights for each checkpoint."""
    alone = run(toy_cfg(tmp_path / 'alone'))
    cfg = toy_cfg(tmp_path / 'averaged')
    cfg.custom_hooks.append(dict(type='EMAHook'))
    averaged = run(cfg)
    ours, theirs = (r.optim_wrapper.modulator for r in (alone, averaged))
    assert ours.history == theirs.history
    assert ours.lr_scale == theirs.lr_scale


def test_series_are_not_kept(tmp_path):
    """Otherwise each value would cost more than the one before."""
    runner = run(toy_cfg(tmp_path / 'run'))
    for key, buffer in runner.message_hub.log_scalars.items():
        if 'agvm' in key:
            assert len(buffer.data[0]) == 1


def only_finite(text):
    raise AssertionError(f'{text} is no JSON')


def test_every_line_is_json(tmp_path):
    """Also without a signal, where the noise scale is infinite."""
    cfg = toy_cfg(tmp_path / 'run', estimator='pairs', ema_decay=0.0)
    cfg.model = dict(type='NoSignal')
    runner = run(cfg)
    assert runner.optim_wrapper.modulator.noise_scale['neck'] == float('inf')
    scalars = Path(runner.log_dir) / 'vis_data' / 'scalars.json'
    lines = [
        json.loads(text, parse_constant=only_finite)
        for text in scalars.read_text().splitlines()
    ]
    known = [line.get('agvm_noise_scale/neck') for line in lines]
    assert known[0] == 1.0 and known[-1] is None
    assert any(number not in (None, 1.0) for number in known)
    assert 'agvm_noise_scale/backbone' in lines[-1]
    found = load_run(Path(cfg.work_dir)).by_module('noise_scale')['neck'][1]
    assert found[-1] == float('inf') and found.min() < float('inf')


def test_compiled_training_is_compiled_once(tmp_path):
    """Also if updates are measured, and with the same numbers."""
    graphs = []

    @HOOKS.register_module(force=True)
    class CountGraphs(Hook):
        def after_train_iter(self, *args, **kwargs):
            graphs.append(counters['stats']['unique_graphs'])

    plain = run(toy_cfg(tmp_path / 'plain', interval=3, estimator='pairs'))
    cfg = toy_cfg(tmp_path / 'run', interval=3, estimator='pairs')
    cfg.compile = dict(backend='eager')
    cfg.custom_hooks.append(dict(type='CountGraphs'))
    torch._dynamo.reset()
    counters.clear()
    compiled = run(cfg)
    assert graphs[0] > 0
    assert set(graphs) == {graphs[0]}
    ours, theirs = (r.optim_wrapper.modulator for r in (compiled, plain))
    assert ours.measured == 3
    assert ours.history == theirs.history


@HOOKS.register_module()
class Unfreeze(Hook):
    """At an epoch, as in mmdet's documentation."""

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            runner.model.backbone[0].requires_grad_(True)


@MODELS.register_module()
class FrozenStart(ToyModel):
    def __init__(self):
        super().__init__()
        self.backbone[0].requires_grad_(False)
        self.rpn_head.requires_grad_(False)


def test_layer_that_a_hook_unfreezes_is_trained_as_in_mmengine(tmp_path):
    weights = []
    for name in ('ours', 'plain'):
        cfg = toy_cfg(tmp_path / name, modulate=False)
        cfg.model = dict(type='FrozenStart')
        cfg.custom_hooks.append(dict(type='Unfreeze'))
        if name == 'plain':
            cfg.custom_hooks = [dict(type='Unfreeze')]
            cfg.optim_wrapper = dict(
                type='OptimWrapper',
                optimizer=cfg.optim_wrapper.optimizer,
                accumulative_counts=2,
            )
        runner = run(cfg)
        weights.append(runner.model.state_dict())
        if name == 'ours':
            assert 'in no module: 18 frozen parameters' in log_of(runner)
    fresh = ToyModel().state_dict()
    for name, weight in weights[1].items():
        assert torch.equal(weights[0][name], weight), name
    assert not torch.equal(
        weights[0]['backbone.0.weight'], fresh['backbone.0.weight']
    )
