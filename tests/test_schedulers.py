"""Exponential warm-up and clipping in a window."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, PARAM_SCHEDULERS
from mmengine.runner import Runner
from toy_runner import toy_cfg


def optimizer(lr=0.5):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def warmup(optimizer, **kwargs):
    return PARAM_SCHEDULERS.build(
        dict(type='ExponentialWarmupLR', by_epoch=False, **kwargs),
        default_args=dict(optimizer=optimizer),
    )


def rates(optimizer, scheduler, steps):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]['lr'])
        scheduler.step()
    return found


def closed_form(t, lr=0.5, start=0.001, begin=0, end=11):
    return lr * start ** max(0.0, 1 - (t - begin) / (end - begin - 1))


@pytest.mark.parametrize('begin', [0, 4])
def test_warmup_is_its_closed_form(begin):
    opt = optimizer()
    found = rates(opt, warmup(opt, begin=begin, end=begin + 11), begin + 15)
    assert found[:begin] == [0.5] * begin
    assert found[begin:] == pytest.approx(
        [closed_form(t) for t in range(15)], rel=1e-12
    )
    # hand-checkable: three decades in ten steps
    assert found[begin] == pytest.approx(0.0005)
    assert found[begin + 10] == pytest.approx(0.5)


def test_warmup_is_resumed():
    opt = optimizer()
    scheduler = warmup(opt, end=11)
    rates(opt, scheduler, 4)
    again = optimizer()
    resumed = warmup(again, end=11)
    again.load_state_dict(opt.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert rates(again, resumed, 10) == rates(opt, scheduler, 10)


def test_warmup_multiplies_with_other_schedules():
    opt = optimizer()
    schedulers = [
        warmup(opt, end=11),
        PARAM_SCHEDULERS.build(
            dict(type='MultiStepLR', milestones=[5], by_epoch=False),
            default_args=dict(optimizer=opt),
        ),
    ]
    for _ in range(8):
        for scheduler in schedulers:
            scheduler.step()
    assert opt.param_groups[0]['lr'] == pytest.approx(0.1 * closed_form(8))


def test_warmup_of_epochs_grows_within_them():
    opt = optimizer()
    scheduler = PARAM_SCHEDULERS.build(
        dict(
            type='ExponentialWarmupLR',
            by_epoch=True,
            begin=1,
            end=3,
            convert_to_iter_based=True,
        ),
        default_args=dict(optimizer=opt, epoch_length=5),
    )
    found = rates(opt, scheduler, 16)
    assert found[5:15] == pytest.approx(
        [closed_form(t, begin=5, end=15) for t in range(5, 15)]
    )


def test_warmup_of_one_step_is_none():
    opt = optimizer()
    assert rates(opt, warmup(opt, end=1), 3) == [0.5] * 3


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(start_factor=0, end=5), 'start_factor=0'),
        (dict(start_factor=2, end=5), 'start_factor=2'),
        (dict(), 'set end'),
    ],
)
def test_warmup_that_cannot_be_meant_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        warmup(optimizer(), **wrong)


# -- clipping


def clipped_iterations(cfg):
    """Iterations of a run whose gradients were clipped."""
    runner = Runner.from_cfg(cfg)
    runner.optim_wrapper = build_optim_wrapper(runner.model, cfg.optim_wrapper)
    clipped = []
    clip = runner.optim_wrapper._clip_grad

    def note():
        clipped.append(runner.iter)
        clip()

    runner.optim_wrapper._clip_grad = note
    runner.train()
    assert runner.optim_wrapper.clip_grad_kwargs == dict(max_norm=0.1)
    return clipped


def clip_cfg(work_dir, begin, end, **kwargs):
    cfg = toy_cfg(
        work_dir,
        accumulative_counts=1,
        begin=100,
        clip_grad=dict(max_norm=0.1),
        **kwargs,
    )
    # one process without accumulation: nothing to measure
    cfg.optim_wrapper = dict(
        optimizer=cfg.optim_wrapper.optimizer,
        clip_grad=cfg.optim_wrapper.clip_grad,
    )
    cfg.custom_hooks = [dict(type='ClipGradWindowHook', begin=begin, end=end)]
    return cfg


@pytest.mark.parametrize(
    'begin, end, expected',
    [(3, 6, [3, 4, 5]), (0, 2, [0, 1]), (13, None, [13, 14, 15])],
)
def test_gradients_are_clipped_in_the_window_only(
    tmp_path, begin, end, expected
):
    cfg = clip_cfg(tmp_path, begin, end, max_epochs=2)  # 16 iterations
    assert clipped_iterations(cfg) == expected


def test_window_behind_the_end_is_reported(tmp_path):
    assert clipped_iterations(clip_cfg(tmp_path, 16, None, max_epochs=2)) == []
    (log,) = tmp_path.glob('*/*.log')
    assert (
        'WARNING - begin=16 of ClipGradWindowHook is after the last '
        'iteration, 15, so nothing is clipped: set a smaller begin'
    ) in log.read_text()


def test_window_is_kept_by_a_resumed_run(tmp_path):
    clipped_iterations(clip_cfg(tmp_path, 6, 11, max_epochs=1))
    cfg = clip_cfg(tmp_path, 6, 11, max_epochs=2)
    cfg.resume = True
    cfg.experiment_name += '_resumed'
    assert clipped_iterations(cfg) == [8, 9, 10]


def test_window_without_clipping_is_refused(tmp_path):
    cfg = clip_cfg(tmp_path, 3, 6)
    del cfg.optim_wrapper['clip_grad']
    with pytest.raises(ValueError, match='set clip_grad=dict'):
        Runner.from_cfg(cfg).train()


@pytest.mark.parametrize('begin, end', [(-1, 5), (5, 5)])
def test_empty_window_is_refused(begin, end):
    with pytest.raises(ValueError, match=f'begin={begin}, end={end}'):
        HOOKS.build(dict(type='ClipGradWindowHook', begin=begin, end=end))
