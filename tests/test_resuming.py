"""Runs that go on from a checkpoint, their own or another's."""

import pytest
import torch
from commands import load_checkpoint
from mmengine.hooks import Hook
from toy import MODULES
from toy_runner import ITERATIONS, log_of, run, toy_cfg

# with both package sets
pytestmark = pytest.mark.host


def test_plateau_lowers_the_rate_of_every_group_of_a_plain_checkpoint(
    tmp_path,
):
    plain = toy_cfg(tmp_path / 'plain', max_epochs=1)
    plain.optim_wrapper = dict(
        type='OptimWrapper',
        optimizer=plain.optim_wrapper.optimizer,
        accumulative_counts=2,
    )
    plain.custom_hooks = []
    plain.param_scheduler = [
        dict(type='ReduceOnPlateauLR', monitor='loss', patience=0, end=99)
    ]
    run(plain)
    cfg = toy_cfg(tmp_path / 'agvm', max_epochs=2)
    cfg.param_scheduler = plain.param_scheduler
    cfg.load_from, cfg.resume = f'{tmp_path}/plain/epoch_1.pth', True
    runner = run(cfg)
    (scheduler,) = runner.param_schedulers
    rates = [g['lr'] for g in runner.optim_wrapper.param_groups]
    for loss in (1.0, 2.0):
        scheduler.step(dict(loss=loss))
    assert [g['lr'] for g in runner.optim_wrapper.param_groups] == [
        pytest.approx(rate / 10) for rate in rates
    ]


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_resumed_run_equals_uninterrupted(tmp_path, optimizer):
    whole = run(toy_cfg(tmp_path / 'whole', optimizer))
    cfg = toy_cfg(tmp_path / 'cut', optimizer)
    cfg.custom_hooks.append(dict(type='PowerCut'))
    with pytest.raises(RuntimeError, match='power cut'):
        run(cfg)
    cfg = toy_cfg(tmp_path / 'cut', optimizer)
    cfg.resume = True
    cfg.experiment_name += '_resumed'
    resumed = run(cfg)
    assert resumed.iter == whole.iter == 2 * ITERATIONS
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight)
    ours, theirs = (
        runner.optim_wrapper.state_dict() for runner in (whole, resumed)
    )
    assert ours['agvm'] == theirs['agvm']
    assert ours['param_groups'] == theirs['param_groups']
    assert ours['agvm']['measured'] == 7


@pytest.mark.parametrize('modules', [None, ['backbone', 'neck']])
def test_schedule_reaches_groups_that_the_checkpoint_had_not(
    tmp_path, modules
):
    """From a plain run, or one with other modules, to six modules."""
    cosine = [
        dict(
            type='CosineAnnealingLR',
            T_max=16,
            eta_min_ratio=0.01,
            by_epoch=False,
        )
    ]
    cfg = toy_cfg(tmp_path / 'run', modules=modules)
    if modules is None:
        cfg.optim_wrapper = dict(
            optimizer=cfg.optim_wrapper.optimizer, accumulative_counts=2
        )
        cfg.custom_hooks = []
    cfg.param_scheduler = cosine
    cfg.custom_hooks.append(dict(type='PowerCut'))
    with pytest.raises(RuntimeError, match='power cut'):
        run(cfg)
    cfg = toy_cfg(tmp_path / 'run')
    cfg.param_scheduler = cosine
    cfg.resume = True
    cfg.experiment_name += '_resumed'
    resumed = run(cfg)
    lrs = [group['lr'] for group in resumed.optim_wrapper.param_groups]
    assert len(lrs) == len(MODULES) + 1
    assert len(set(lrs)) == 1
    assert lrs[0] < 0.05 / 40  # at the end of the cosine


def test_checkpoint_carries_no_series_of_agvm(tmp_path):
    run(toy_cfg(tmp_path / 'run', max_epochs=1))
    checkpoint = load_checkpoint(tmp_path / 'run' / 'epoch_1.pth')
    assert not [
        key
        for key in checkpoint['message_hub']['log_scalars']
        if 'agvm' in key
    ]


def test_resumed_behind_the_last_measurement_is_no_fault(tmp_path):
    run(toy_cfg(tmp_path / 'run', max_epochs=1, begin=1, interval=2))
    cfg = toy_cfg(tmp_path / 'run', begin=1, interval=99)
    cfg.resume = True
    cfg.experiment_name += '_resumed'
    log = log_of(run(cfg))
    assert 'measured: set' not in log and 'measured 0 of' not in log


def resumed(tmp_path, **settings):
    """The toy resumed after an epoch; ``settings`` of its first start."""
    hooks = settings.pop('checkpoint', {})
    cfg = toy_cfg(tmp_path / 'run', max_epochs=1, **settings)
    cfg.default_hooks.checkpoint.update(hooks)
    first = run(cfg)
    cfg = toy_cfg(tmp_path / 'run')
    cfg.resume = True
    cfg.experiment_name += '_resumed'
    return first, run(cfg)


def test_checkpoint_without_optimizer_is_reported(tmp_path):
    _, runner = resumed(tmp_path, checkpoint=dict(save_optimizer=False))
    log = log_of(runner)
    assert f'training continues at iteration {ITERATIONS}, but no' in log
    assert 'every lr_scale starts at 1' in log
    assert runner.optim_wrapper.agvm.update == ITERATIONS  # 2 epochs of 2


@pytest.mark.parametrize('old', [False, True])
def test_resuming_does_not_warn_of_agvms_keys(tmp_path, old, monkeypatch):
    """The checkpoint is new, or names them as older ones do."""
    if old:
        monkeypatch.setattr(
            'mmagvm.engine.hook.AGVMHook.before_save_checkpoint',
            Hook.before_save_checkpoint,
        )
    first, runner = resumed(tmp_path)
    checkpoint = load_checkpoint(tmp_path / 'run' / 'epoch_1.pth')
    names = checkpoint['message_hub']['resumed_keys']
    assert any(n.startswith('train/agvm') for n in names) == old
    assert 'train/loss' in names
    log = log_of(runner)
    assert 'just skip resuming' not in log
    assert 'no state of the optimizer' not in log
