"""What a run reports or refuses at its start, and reports at its end."""

import contextlib
import re

import pytest
import torch
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from toy_runner import (
    ITERATIONS,
    ToyModel,
    log_of,
    run,
    toy_cfg,
    train_lines,
)

from mmagvm.engine.hook import useless_sync_bn
from mmagvm.version import full_version

# with both package sets
pytestmark = pytest.mark.host


@MODELS.register_module()
class OwnTrainStep(ToyModel):
    """Has a train_step of its own, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        if way == 'own optimizer':
            self.own = torch.optim.SGD(self.parameters(), lr=0.01)

    def train_step(self, data, optim_wrapper):
        context = optim_wrapper.optim_context(self)
        if self.way in ('no context', 'own step', 'own optimizer'):
            context = contextlib.nullcontext()
        with context:
            loss = self(**data)['loss']
        if self.way == 'infinite':
            loss = loss * float('inf')
        if self.way == 'no anchor':
            loss = self.rpn_head(data['inputs'][:, :5]).sum()
        if self.way in ('no context', 'infinite', 'no anchor'):
            optim_wrapper.update_params(loss)
            return dict(loss=loss)
        loss.backward()
        step = {
            'own backward': optim_wrapper,
            'own step': optim_wrapper.optimizer,
            'own optimizer': getattr(self, 'own', None),
        }[self.way]
        step.step()
        step.zero_grad()
        return dict(loss=loss)


def test_start_is_described(tmp_path):
    log = log_of(run(toy_cfg(tmp_path / 'run', max_epochs=1)))
    for line in (
        'batch size 8 = 1 ranks x 4 images x 2 accumulated micro-batches',
        f'mmagvm {full_version()}',
        "SGD with learning rate 0.05; the paper's rule for COCO gives 0.01 ",
        'measures every 1 updates from update 1; all modules follow backbone',
        'module backbone: 133 parameters in 1 group(s), lr_scale 1.000',
        'module roi_head.mask_head: 6 parameters in 1 group(s)',
        'module others: 1 parameters in 1 group(s)',
    ):
        assert f'AGVM: {line}' in log


@pytest.mark.parametrize(
    'warmup, updates',
    [
        (dict(type='LinearLR', start_factor=0.1, end=7, by_epoch=False), 4),
        (dict(type='ConstantLR', factor=0.1, end=2), ITERATIONS),
        (dict(type='mmdet.QuadraticWarmupLR', end=6, by_epoch=False), 3),
        (dict(type='ExponentialWarmupLR', end=6, by_epoch=False), 3),
        (
            # its last step of 30 % of 40 is number 11
            dict(
                type='OneCycleLR', eta_max=0.1, total_steps=40, by_epoch=False
            ),
            6,
        ),
    ],
)
def test_measuring_from_within_warmup_is_reported(tmp_path, warmup, updates):
    message = f'which lasts {updates} updates'
    for begin in (updates - 1, updates):
        cfg = toy_cfg(tmp_path / str(begin), max_epochs=3)
        # with one that ends with the run, which is no warm-up
        cfg.param_scheduler = [
            warmup,
            dict(type='ReduceOnPlateauLR', monitor='loss'),
        ]
        cfg.optim_wrapper.begin = begin
        log = log_of(run(cfg))
        assert (message in log) == (begin < updates)
        assert (f'set optim_wrapper.begin={updates}' in log) == (
            message in log
        )


@pytest.mark.parametrize(
    'scheduler',
    [
        dict(type='MultiStepLR', milestones=[1]),
        dict(type='LinearLR', start_factor=1, end_factor=0.1, end=2),
        dict(type='LinearLR', start_factor=0.1, begin=1, end=2),
        dict(type='LinearMomentum', start_factor=0.1, end=2),
        dict(type='ConstantLR', factor=0.1),  # as long as the run
    ],
)
def test_what_is_no_warmup_is_not_reported(tmp_path, scheduler):
    cfg = toy_cfg(tmp_path / 'run', max_epochs=1)
    cfg.param_scheduler = [scheduler]
    cfg.optim_wrapper.begin = 0
    assert 'warm-up' not in log_of(run(cfg))


@pytest.mark.parametrize(
    'schedulers',
    [
        [],
        [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=4)],
        [dict(type='CosineAnnealingLR', by_epoch=False)],
    ],
)
def test_scaled_learning_rate_is_reported_and_logged(tmp_path, schedulers):
    cfg = toy_cfg(tmp_path / 'run', max_epochs=2)
    cfg.param_scheduler = schedulers
    # half, for half as many images in a forward pass
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=8)
    runner = run(cfg)
    assert 'AGVM: SGD with learning rate 0.025;' in log_of(runner)
    lines = train_lines(runner)
    for line in lines:
        assert line['base_lr'] == pytest.approx(line['lr'])
    cfg.work_dir += '_resumed'
    cfg.experiment_name += '_resumed'
    cfg.load_from, cfg.resume = f'{tmp_path}/run/epoch_1.pth', True
    resumed = run(cfg)
    assert 'AGVM: SGD with learning rate 0.025;' in log_of(resumed)
    assert [(x['lr'], x['base_lr']) for x in train_lines(resumed)] == [
        (x['lr'], x['base_lr']) for x in lines[ITERATIONS:]
    ]


def test_flexible_runner_is_reported_before_its_first_iteration(tmp_path):
    cfg = toy_cfg(tmp_path / 'run', accumulative_counts=1)
    cfg.env_cfg = dict(dist_cfg=dict(backend='gloo'))
    runner = FlexibleRunner.from_cfg(cfg)
    with pytest.raises(ValueError, match='accumulative_counts=2 or more'):
        runner.train()
    assert 'AGVM: batch size' not in log_of(runner)
    cfg = toy_cfg(tmp_path / 'two', max_epochs=1)
    cfg.env_cfg = dict(dist_cfg=dict(backend='gloo'))
    runner = FlexibleRunner.from_cfg(cfg)
    runner.train()
    assert runner.optim_wrapper.modulator.measured == 3


def test_measuring_alone_may_begin_within_warmup(tmp_path):
    cfg = toy_cfg(tmp_path / 'run', max_epochs=1, modulate=False)
    cfg.param_scheduler = [dict(type='LinearLR', start_factor=0.1, end=1)]
    assert 'warm-up' not in log_of(run(cfg))


def test_other_wrapper_is_refused_before_training(tmp_path):
    cfg = toy_cfg(tmp_path / 'run')
    cfg.optim_wrapper = dict(optimizer=cfg.optim_wrapper.optimizer)
    with pytest.raises(TypeError, match='is OptimWrapper, which does not'):
        run(cfg)
    assert not list((tmp_path / 'run').glob('*.pth'))


@pytest.mark.parametrize(
    'hook, error',
    [('AGVMHook', TypeError), ('ClipGradWindowHook', ValueError)],
)
def test_several_optimizers_are_refused_before_training(tmp_path, hook, error):
    """Also where AGVM's wrapper is in MMEngine's dict of them."""
    cfg = toy_cfg(tmp_path / 'run')
    model = ToyModel()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    cfg.custom_hooks = [dict(type=hook)]
    if hook == 'ClipGradWindowHook':
        cfg.custom_hooks[0].begin = 0
    runner = Runner(
        model=model,
        optim_wrapper=OptimWrapperDict(first=wrapper),
        **{
            key: value
            for key, value in cfg.items()
            if key not in ('model', 'optim_wrapper', 'param_scheduler')
        },
    )
    with pytest.raises(error, match=r"has several, \['first'\]"):
        runner.train()


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(begin=9), 'begin=9 is after the last update, 7, .*set .*begin'),
        (dict(begin=8), 'begin=8 is after the last update, 7, '),
        (
            dict(interval=99),
            'interval=99 is not less than the 7 updates that remain .* so 1 '
            'is measured: set optim_wrapper.interval',
        ),
        (dict(begin=0, interval=8), 'interval=8 .* the 8 .* 1 is measured'),
        (
            dict(begin=0, interval=8, optimizer='AdamW', estimator='pairs'),
            'interval=8 .* none is measured',
        ),
        (
            dict(
                begin=0,
                end=1,
                interval=2,
                optimizer='AdamW',
                estimator='pairs',
            ),
            'begin=0, end=1 and interval=2 leave no update',
        ),
        (dict(begin=0, interval=7), None),
        (dict(begin=7), None),
        (dict(begin=0, end=1), None),
    ],
)
def test_too_few_due_is_reported_at_the_start(tmp_path, settings, message):
    cfg = toy_cfg(tmp_path / 'run', **settings)
    log = log_of(run(cfg))
    start = log[: log.index('Epoch(train)')]
    if message is None:
        assert 'is measured: set' not in start and 'leave no' not in start
    else:
        assert re.search(f'WARNING - AGVM: {message}', start), start


@pytest.mark.parametrize(
    'way, at_once, at_the_end',
    [
        ('no context', True, 'train_step does not run the model inside of'),
        ('own backward', True, "the loss's own backward"),
        ('own step', True, "the optimizer's own step"),
        ('own optimizer', False, 'the optimizer made no step'),
        ('infinite', True, 'gradients were NaN or infinite .3 times'),
        ('no anchor', False, 'the module that the others follow had no'),
    ],
)
@pytest.mark.parametrize('estimator', ['pairs', 'split'])
def test_nothing_measured_is_reported(
    tmp_path, way, at_once, at_the_end, estimator
):
    cfg = toy_cfg(tmp_path / 'run', max_epochs=1, estimator=estimator)
    cfg.model = dict(type='OwnTrainStep', way=way)
    log = log_of(run(cfg))
    assert re.search(f'measured 0 of 4 updates, because {at_the_end}', log)
    if at_once:
        first = log.index('WARNING - AGVM: ', log.index('Epoch(train)') - 1000)
        assert first < log.rindex('Epoch(train)')


def test_what_was_not_due_is_reported_at_the_end_too(tmp_path):
    log = log_of(run(toy_cfg(tmp_path / 'run', max_epochs=1, begin=99)))
    assert 'measured 0 of 4 updates, because none of them was due' in log
    log = log_of(run(toy_cfg(tmp_path / 'usual', max_epochs=1)))
    assert 'updates, because' not in log and 'not measured' not in log


def test_own_rules_are_described_and_an_idle_one_is_reported(tmp_path):
    rules = dict(restart_at_lr_drop=True, bound_by_grad_norm=True)
    cfg = toy_cfg(tmp_path / 'run', estimator='pairs', **rules)
    dropped = log_of(run(cfg))
    start = dropped[: dropped.index('Epoch(train)')]
    assert 'moving averages of lr_scale restart when the learning' in start
    assert 'is divided by the growth of its gradient norm' in start
    assert 'the learning rate has dropped from' in dropped
    assert 'changed nothing' not in dropped
    cfg = toy_cfg(tmp_path / 'constant', restart_at_lr_drop=True)
    cfg.param_scheduler = []
    constant = log_of(run(cfg))
    assert 'WARNING - AGVM: restart_at_lr_drop=True changed n' in constant
    assert 'growth of its' not in constant


def test_updates_that_are_missed_are_reported(tmp_path):
    cfg = toy_cfg(
        tmp_path / 'run', 'AdamW', max_epochs=1, begin=0, estimator='pairs'
    )
    assert 'are not measured: the optimizer had no state yet' in log_of(
        run(cfg)
    )


def test_one_rank_without_accumulation_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match='accumulative_counts=1'):
        run(toy_cfg(tmp_path / 'run', accumulative_counts=1))


def test_useless_sync_bn_is_found():
    model = nn.Module()
    model.backbone = nn.Sequential(nn.SyncBatchNorm(2))
    model.neck = nn.Sequential(nn.SyncBatchNorm(2))
    model.backbone.norm_eval, model.neck.norm_eval = True, False
    assert useless_sync_bn(model) == ['backbone']
    wrapped = nn.Module()  # as DistributedDataParallel holds it
    wrapped.module = model
    assert useless_sync_bn(wrapped) == ['backbone']
    model.backbone = nn.Sequential(nn.BatchNorm2d(2))
    model.backbone.norm_eval = True
    assert useless_sync_bn(model) == []
