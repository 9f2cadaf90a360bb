"""The hook and a whole MMEngine run: reports, logs, and resuming."""

import contextlib
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import load_checkpoint
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import DATA_SAMPLERS, HOOKS, MODELS
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from toy import MODULES
from toy_runner import ITERATIONS, ToyDataset, ToyModel, toy_cfg

from mmagvm.analysis.run_log import load_run
from mmagvm.engine import host as compat
from mmagvm.engine.batch_size import count_images
from mmagvm.engine.hook import innermost, useless_sync_bn
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


@HOOKS.register_module()
class PowerCut(Hook):
    """Ends a run in its second epoch, after the first one's checkpoint."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.epoch == 1 and batch_idx == 3:
            raise RuntimeError('power cut')


def run(cfg):
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def train_lines(runner):
    scalars = Path(runner.log_dir) / 'vis_data' / 'scalars.json'
    return [json.loads(text) for text in scalars.read_text().splitlines()]


def log_of(runner):
    return next(Path(runner.log_dir).glob('*.log')).read_text()


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


def test_one_learning_rate_for_all_stays_as_given(tmp_path):
    cfg = toy_cfg(tmp_path / 'run', max_epochs=1)
    cfg.param_scheduler = [
        dict(type='OneCycleLR', eta_max=0.5, total_steps=8, by_epoch=False)
    ]
    for line in train_lines(run(cfg)):
        assert line['base_lr'] == pytest.approx(line['lr'])


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


def test_noise_scale_is_logged_in_images(tmp_path):
    cfg = toy_cfg(tmp_path / 'run', max_epochs=1, estimator='pairs')
    runner = run(cfg)
    lines = train_lines(runner)
    assert lines[0]['agvm_noise_scale/neck'] == 1.0
    samples = runner.optim_wrapper.modulator.noise_scale
    for module in MODULES:
        # a sample is a micro-batch of 4 images
        assert lines[-1][f'agvm_noise_scale/{module}'] == pytest.approx(
            4 * samples[module]
        )


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


@pytest.mark.parametrize('counts', [1, 2])
def test_learning_rate_that_forgets_accumulation_is_reported(tmp_path, counts):
    cfg = toy_cfg(tmp_path / 'run', max_epochs=1, accumulative_counts=counts)
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=16)
    if counts == 1:
        cfg.optim_wrapper = dict(optimizer=cfg.optim_wrapper.optimizer)
        cfg.custom_hooks = []
        assert 'ignores accumulative_counts' not in log_of(run(cfg))
        return
    assert (
        'base_batch_size=16 has multiplied the learning rate by 0.25, for 4 '
        'images, but ignores accumulative_counts=2. An update has 8 '
        'images, and the factor would be 0.5: set '
        'auto_scale_lr.base_batch_size=8, or'
    ) in log_of(run(cfg))
    cfg = toy_cfg(tmp_path / 'sampled', max_epochs=1)
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=16)
    # as mmdet's configs, whose loaders do not know their batch size
    cfg.train_dataloader.batch_sampler = dict(type='PlainBatches')
    assert 'by 0.25, for 4 images, but ignores' in log_of(run(cfg))
    cfg = toy_cfg(tmp_path / 'off', max_epochs=1)
    cfg.auto_scale_lr = dict(enable=False, base_batch_size=16)
    assert 'ignores accumulative_counts' not in log_of(run(cfg))


@DATA_SAMPLERS.register_module()
class PlainBatches(BatchSampler):
    """torch's data loader, built from a config."""

    def __init__(self, sampler, batch_size):
        super().__init__(sampler, batch_size, drop_last=False)


class Batches(torch.utils.data.Sampler):
    """Batches of three, which it does not state."""

    def __init__(self, sampler):
        self.count = len(sampler) // 3

    def __iter__(self):
        return iter(torch.arange(3 * self.count).view(-1, 3).tolist())

    def __len__(self):
        return self.count


class Stream(torch.utils.data.IterableDataset):
    """Makes its own batches."""

    def __iter__(self):
        return (dict(inputs=torch.randn(5, 6)) for _ in range(8))

    def __len__(self):
        return 8


def small_loader(batches):
    """Of the toy's images, as ``batches`` puts them together."""
    if batches == 'stream':
        return DataLoader(Stream(), batch_size=None)
    sampler = SequentialSampler(ToyDataset())
    if batches == 'unknown':
        sampler = Batches(sampler)
    else:
        sampler = MultiSize([range(4), range(4, 6)] * 4)
    return DataLoader(ToyDataset(), batch_sampler=sampler)


class MultiSize(list):
    """Like a sampler that alternates between data sets."""

    batch_size = [4, 2]


@pytest.mark.parametrize(
    'batches, images, message',
    [
        ('unknown', 3, 'batch size 6 = 1 ranks x 3 images x 2 accumulated'),
        ('stream', 5, 'batch size 10 = 1 ranks x 5 images x 2 accumulated'),
        ('several', None, 'batch size unknown = 1 ranks x 4 or 2 images x 2'),
    ],
)
def test_images_are_counted_where_the_loader_does_not_tell(
    tmp_path, batches, images, message
):
    cfg = toy_cfg(tmp_path / 'run', max_epochs=1, estimator='pairs')
    cfg.default_hooks.sampler_seed = None  # it expects MMEngine's samplers
    runner = Runner(
        model=dict(type='ToyModel'),
        train_dataloader=small_loader(batches),
        **{
            key: value
            for key, value in cfg.items()
            if key not in ('model', 'train_dataloader')
        },
    )
    runner.train()
    assert message in log_of(runner)
    agvm = runner.optim_wrapper.agvm
    assert agvm.batch['images_per_rank'] == images
    last = train_lines(runner)[-1]
    if images is None:
        assert 'so no noise scale is logged' in log_of(runner)
        assert not [key for key in last if 'noise_scale' in key]
    else:
        assert last['agvm_noise_scale/neck'] == pytest.approx(
            images * agvm.modulator.noise_scale['neck']
        )


class Sample:
    """Like a data sample of mmdet."""

    def __init__(self, img_path):
        self.img_path = img_path


@pytest.mark.parametrize(
    'batch, images',
    [
        (dict(inputs=torch.zeros(7, 3, 4, 4)), 7),
        (dict(inputs=[torch.zeros(3, 4, 4)] * 2, data_samples=[1, 2]), 2),
        (dict(inputs=torch.zeros(3, 4, 4)), None),  # one image, or three?
        ([dict(inputs=0), dict(inputs=0), dict(inputs=0)], 3),
        ([torch.zeros(6, 3, 4, 4), torch.zeros(6)], 6),
        (dict(inputs=dict(img=[0, 0], points=[0, 0])), 2),
        (dict(inputs=dict(img=[0, 0], points=[0])), None),
        (
            # as MultiBranch of mmdet fills branches
            dict(
                inputs=dict(sup=[0, None, None], student=[None, 0, 0]),
                data_samples=dict(
                    sup=[Sample('a'), None, None],
                    student=[None, Sample('b'), Sample('c')],
                ),
            ),
            3,
        ),
        (
            dict(
                inputs=dict(sup=[0], teacher=[0, 0], student=[0, 0]),
                data_samples=dict(
                    sup=[Sample('a')],
                    teacher=[Sample('b'), Sample('c')],
                    student=[Sample('c'), Sample('b')],
                ),
            ),
            3,
        ),
        (dict(data_samples=dict(sup=[Sample(None)])), None),
        ({}, None),
        (None, None),
    ],
)
def test_images_of_a_batch(batch, images):
    assert count_images(batch) == images


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


def test_another_batch_on_resume_is_reported(tmp_path):
    cfg = toy_cfg(tmp_path / 'run')
    cfg.train_cfg.max_epochs = 1
    run(cfg)
    cfg = toy_cfg(tmp_path / 'run')
    cfg.train_dataloader.batch_size = 2
    cfg.resume = True
    cfg.experiment_name += '_resumed'
    log = log_of(run(cfg))
    assert "'images_per_rank': 4" in log
    assert 'lr_scale keeps its values' in log


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


def test_resumed_behind_the_last_measurement_is_no_fault(tmp_path):
    run(toy_cfg(tmp_path / 'run', max_epochs=1, begin=1, interval=2))
    cfg = toy_cfg(tmp_path / 'run', begin=1, interval=99)
    cfg.resume = True
    cfg.experiment_name += '_resumed'
    log = log_of(run(cfg))
    assert 'measured: set' not in log and 'measured 0 of' not in log


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


def test_import_registers_and_needs_no_host():
    code = (
        'import sys, mmagvm\n'
        'from mmengine.registry import HOOKS, OPTIM_WRAPPERS\n'
        "assert HOOKS.get('AGVMHook') is mmagvm.AGVMHook\n"
        "assert OPTIM_WRAPPERS.get('AGVMOptimWrapper')\n"
        "assert not {'mmdet', 'mmseg', 'mmcv'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_taken_names_are_left_alone_and_reported():
    """In a project that has its own classes of these names."""
    code = (
        'import importlib, sys\n'
        'from mmengine.registry import *\n'
        'import mmengine.optim\n'
        'TAKEN = {\n'
        "    OPTIMIZERS: ['LARS', 'LAMB', 'PMDLAMB', 'SOAP', 'Muon'],\n"
        "    HOOKS: ['AGVMHook', 'ClipGradWindowHook'],\n"
        "    OPTIM_WRAPPERS: ['AGVMOptimWrapper', 'AGVMAmpOptimWrapper'],\n"
        "    OPTIM_WRAPPER_CONSTRUCTORS: ['AGVMOptimWrapperConstructor'],\n"
        "    PARAM_SCHEDULERS: ['ExponentialWarmupLR'],\n"
        "    TRANSFORMS: ['LoadPanopticSegments'],\n"
        "    MODELS: ['CGBN'],\n"
        '}\n'
        'theirs = {}\n'
        'for registry, names in TAKEN.items():\n'
        '    for name in names:\n'
        '        theirs[name] = type(name, (), {})\n'
        '        registry.register_module(module=theirs[name], force=True)\n'
        'import mmagvm\n'
        'for registry, names in TAKEN.items():\n'
        '    for name in names:\n'
        '        assert registry.get(name) is theirs[name], name\n'
        "        ours = registry.get(f'mmagvm_{name}')\n"
        "        assert ours.__module__.startswith('mmagvm.'), ours\n"
        "print('once', file=sys.stderr)\n"
        "for name in [n for n in sys.modules if n.startswith('mmagvm')]:\n"
        '    del sys.modules[name]\n'
        'import mmagvm\n'
        "assert HOOKS.get('mmagvm_AGVMHook') is mmagvm.AGVMHook\n"
    )
    done = subprocess.run(
        [sys.executable, '-c', code], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    errors = done.stderr.split('once')[0]
    assert (
        "type='LARS' of the optimizers stands for __main__.LARS here: to use "
        "mmagvm.recipes.optimizers.LARS, write type='mmagvm_LARS'"
    ) in errors
    assert errors.count(' here: to use mmagvm.') == 13


def test_names_that_are_taken_later_are_reported():
    """As if this project's tools import another project."""
    code = (
        'import mmagvm\n'
        'from mmengine.registry import OPTIMIZERS\n'
        'OPTIMIZERS.register_module()(type("LARS", (), {}))\n'
        "theirs = OPTIMIZERS.get('LARS')\n"
        "assert theirs.__module__ == '__main__'\n"
        "assert OPTIMIZERS.get('mmagvm_LARS').__module__[:6] == 'mmagvm'\n"
        'try:\n'
        '    OPTIMIZERS.register_module()(type("LARS", (), {}))\n'
        'except KeyError: print("KeyError")\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], text=True, capture_output=True
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, 'KeyError')
    message = "type='LARS' of the optimizers stands for __main__.LARS here"
    assert message in done.stdout + done.stderr


def test_joined_data_sets_are_known_by_what_they_join():
    class Inner:
        pass

    def joined(*datasets):
        return SimpleNamespace(datasets=datasets)

    one = Inner()
    repeated = SimpleNamespace(dataset=joined(one, Inner()))
    assert innermost(repeated) is innermost(joined(repeated, one)) is one
    different = joined(one, 'another')
    assert innermost(different) is different


def test_second_import_is_silent():
    code = (
        'import sys, mmagvm\n'
        'from mmengine.registry import HOOKS, OPTIMIZERS\n'
        "for name in [n for n in sys.modules if n.startswith('mmagvm')]:\n"
        '    del sys.modules[name]\n'
        'import mmagvm\n'
        "assert HOOKS.get('AGVMHook') is mmagvm.AGVMHook\n"
        'from mmagvm.recipes.registry import taken\n'
        'assert not taken\n'
        'assert not [n for n in OPTIMIZERS.module_dict if "mmagvm" in n]\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], text=True, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.parametrize('version', ['mmengine', 'torch'])
def test_old_host_is_refused(version, monkeypatch):
    import mmengine

    from mmagvm.engine.host import check_versions

    package = dict(mmengine=mmengine, torch=torch)[version]
    monkeypatch.setattr(package, '__version__', '0.1')
    with pytest.raises(ImportError, match=f'needs {version} >= .*0.1 is'):
        check_versions()


def test_mmseg_bases_are_found_without_mmsegmentation(monkeypatch):
    """The fork has the module, but its package has another name."""

    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(compat, 'version', version)
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'no-such-package')
    compat.find_mmseg_bases()
    base = 'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'
    assert 'model' in Config.fromfile(Config._get_cfg_path(base, '')[0])


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
