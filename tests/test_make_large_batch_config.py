"""tools/misc/make_large_batch_config.py, on configs of all kinds.

1. What does not need a model: how a batch is split.
2. An epoch-based config of mmdet, an iteration-based one of mmseg, a user's
   own: what is written, and that it is loaded.
3. What is refused.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import load_command
from mmengine.config import Config
from mmengine.registry import DefaultScope

from mmagvm.errors import UsageError
from mmagvm.launch.runner import refuse_ignored_settings
from mmagvm.planning.batch import Batch, split_batch
from mmagvm.planning.large_batch_config import advise_batch, default_out

TOOL = Path(__file__).parent.parent / 'tools/misc/make_large_batch_config.py'
FASTER_RCNN = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
SEM_FPN = 'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'
SEGFORMER = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'


@pytest.fixture(scope='module')
def tool():
    yield load_command('misc/make_large_batch_config.py')
    DefaultScope._instance_dict.clear()


@pytest.fixture
def make(tool, tmp_path, monkeypatch, capsys):
    """Call the tool; the written config, its text and the output."""

    def call(config, *options, out=None):
        out = out or tmp_path / 'out.py'
        arguments = [config, *options, '--out', out]
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, arguments)])
        tool.main()
        return Config.fromfile(out), out.read_text(), capsys.readouterr().out

    return call


PURE_PYTHON_BASE = """
from mmdet.datasets import CocoDataset
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.optim import AmpOptimWrapper, LinearLR, MultiStepLR
from mmengine.runner import EpochBasedTrainLoop
from torch.optim import SGD

default_scope = None
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=CocoDataset, ann_file='no.json', pipeline=[]))
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=12)
optim_wrapper = dict(
    type=AmpOptimWrapper, optimizer=dict(type=SGD, lr=0.01, momentum=0.9))
param_scheduler = [
    dict(type=LinearLR, start_factor=0.1, by_epoch=False, begin=0, end=100),
    dict(type=MultiStepLR, by_epoch=True, milestones=[8])]
custom_hooks = [dict(type=EMAHook)]
default_hooks = dict(checkpoint=dict(type=CheckpointHook, interval=1))
"""
PURE_PYTHON = """
from mmengine.config import read_base
from torch.nn import BatchNorm2d
from torch.optim import SGD

with read_base():
    from .pure_base import *
from mmdet.models import (
    FPN, DetDataPreprocessor, FocalLoss, L1Loss, ResNet, RetinaHead, RetinaNet)
from mmdet.models.task_modules import (
    AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, PseudoSampler)

model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor),
    backbone=dict(
        type=ResNet, depth=18, base_channels=8, num_stages=4,
        norm_cfg=dict(type=BatchNorm2d)),
    neck=dict(
        type=FPN, in_channels=[8, 16, 32, 64], out_channels=16, num_outs=5),
    bbox_head=dict(
        type=RetinaHead, num_classes=2, in_channels=16, feat_channels=16,
        anchor_generator=dict(
            type=AnchorGenerator, octave_base_scale=4, scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss), loss_bbox=dict(type=L1Loss)),
    train_cfg=dict(
        assigner=dict(
            type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4),
        sampler=dict(type=PseudoSampler)))
"""


@pytest.fixture
def pure_python(tmp_path):
    """A config without strings for types, and its base."""

    def write(lines=''):
        folder = tmp_path / 'configs'
        folder.mkdir(exist_ok=True)
        (folder / 'pure_base.py').write_text(PURE_PYTHON_BASE)
        file = folder / 'pure.py'
        file.write_text(f'{PURE_PYTHON}\n{lines}\n')
        return file

    return write


# -- how a batch is split


@pytest.mark.parametrize(
    'batch, gpus, most, images, accumulation',
    [
        (1024, 64, 16, 16, 1),
        (1024, 8, 16, 16, 8),
        (512, 64, 16, 8, 1),
        (96, 4, 16, 12, 2),
        (34, 2, 16, 1, 17),
        (16, 1, 16, 8, 2),  # AGVM needs two micro-batches on one GPU
        (2, 1, 16, 1, 2),
        (64, 4, 4, 4, 4),
    ],
)
def test_batch_is_split(batch, gpus, most, images, accumulation):
    split = split_batch(batch, gpus, most)
    assert (split.images_per_gpu, split.accumulation) == (images, accumulation)


@pytest.mark.parametrize(
    'batch, gpus, sampler, fuller',
    [
        (34, 2, {}, 32),
        (544, 32, {}, 512),
        (124, 4, {}, 128),
        (480, 32, {}, None),
        (96, 4, {}, None),
        # AGVM makes two of 8 there
        (17, 1, {}, None),
        # 16 is not divided by 1 + 4
        (544, 32, dict(source_ratio=[1, 4]), None),
    ],
)
def test_fuller_micro_batches_are_advised(batch, gpus, sampler, fuller):
    cfg = Config(dict(train_dataloader=dict(sampler=sampler)))
    advice = advise_batch(cfg, split_batch(batch, gpus, 16), 16, agvm=True)
    found = re.findall(r'--batch-size (\d+) has 16', ' '.join(advice))
    assert found == ([] if fuller is None else [str(fuller)])


def test_every_kind_of_version_has_a_name_of_its_own():
    batch = Batch(64, 4, 8, 2, 16)
    name = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
    assert str(default_out(name, batch, None, False, False)) == (
        'retinanet_r50_fpn_1x_coco_4xb8x2.py'
    )
    assert str(default_out(name, batch, 'AdamW', True, True)) == (
        'retinanet_r50_fpn_1x_coco_4xb8x2-agvm-adamw-shard.py'
    )


# -- what is written


def test_epoch_based_config_of_mmdet(make):
    cfg, text, printed = make(FASTER_RCNN, '--batch-size', 1024, '--gpus', 64)
    assert len(text.splitlines()) < 60
    assert cfg.train_dataloader.batch_size == 16
    wrapper = cfg.optim_wrapper
    assert wrapper.type == 'AGVMOptimWrapper'
    assert wrapper.optimizer.lr == pytest.approx(0.452, abs=1e-3)  # the paper
    assert wrapper.optimizer.momentum == 0.9  # inherited
    assert (wrapper.accumulative_counts, wrapper.interval) == (1, 5)
    warmup, decay = cfg.param_scheduler
    assert (warmup.begin, warmup.end, warmup.by_epoch) == (0, 230, False)
    assert decay.milestones == [8, 11]
    assert wrapper.begin == 330
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=1024)
    assert cfg.default_hooks.logger.interval == wrapper.interval
    assert [hook.type for hook in cfg.custom_hooks] == ['AGVMHook']
    assert 'modules: backbone, neck, rpn_head' in printed
    assert 'requires_grad=True), norm_eval=False' in printed
    assert 'gradients are not clipped' in printed
    assert 'its auto_scale_lr.base_batch_size' in printed


def test_accumulation_counts_iterations_and_updates_apart(make):
    cfg, _, _ = make(FASTER_RCNN, '--batch-size', 1024, '--gpus', 16)
    assert cfg.train_dataloader.batch_size == 16
    assert cfg.optim_wrapper.accumulative_counts == 4
    # MMEngine's --auto-scale-lr does not know of accumulation
    assert cfg.auto_scale_lr.base_batch_size == 16 * 16
    assert cfg.default_hooks.logger.interval == 4 * cfg.optim_wrapper.interval
    assert cfg.param_scheduler[0].end == 4 * 230
    assert cfg.optim_wrapper.begin == 330


def test_iteration_based_config_of_mmseg(make):
    cfg, _, printed = make(
        *(SEM_FPN, '--batch-size', 512, '--gpus', 16),
        *('--base-batch-size', 32),
    )
    # the paper's table
    assert cfg.train_cfg.max_iters == 2 * 10000
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(0.113, abs=2e-4)
    assert cfg.optim_wrapper.interval == 5
    assert cfg.optim_wrapper.accumulative_counts == 2
    warmup, poly = cfg.param_scheduler
    assert (warmup.type, warmup.end) == ('LinearLR', 2 * 500)
    assert (poly.begin, poly.end, poly.power) == (0, 2 * 10000, 0.9)
    assert cfg.optim_wrapper.begin == 600
    assert cfg.train_cfg.val_interval == 2000
    assert cfg.default_hooks.checkpoint.interval == 2000
    assert '160000 -> 20000 iterations' in printed


@pytest.mark.parametrize(
    'old, new',
    [
        (dict(val_interval=4000, val_begin=120000), (500, 15000)),
        (dict(val_interval=160001), (20001, 1)),  # never
    ],
    ids=['late', 'never'],
)
def test_validation_begins_where_it_did(make, own, old, new):
    file = own(SEM_FPN, f'train_cfg = dict(**{old})')
    cfg, _, _ = make(
        *(file, '--batch-size', 512, '--gpus', 32),
        *('--base-batch-size', 64),
    )
    begin = cfg.train_cfg.get('val_begin', 1)
    assert (cfg.train_cfg.val_interval, begin) == new


def test_own_warmup_and_base_batch_are_found(make):
    cfg, _, printed = make(SEGFORMER, '--batch-size', 64, '--gpus', 8)
    assert 'the name segformer_mit-b0_8xb2' in printed
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(4 * 6e-5)
    warmup, poly = cfg.param_scheduler
    assert warmup.start_factor == 1e-6
    assert (warmup.end, poly.begin, poly.end) == (500, 500, 40000)
    assert 'custom_keys' in str(cfg.optim_wrapper.paramwise_cfg)


def test_official_recipe_goes_on_fewer_gpus(make):
    """Its warm-up is found, and its clipping is kept."""
    recipe = (
        TOOL.parents[2]
        / 'configs/faster_rcnn/faster-rcnn-align_r50_fpn_32xb16-16e_coco.py'
    )
    cfg, _, printed = make(recipe, '--batch-size', 512, '--gpus', 8)
    warmup, _ = cfg.param_scheduler
    assert (warmup.type, warmup.end) == ('ExponentialWarmupLR', 4 * 460)
    clip, agvm = cfg.custom_hooks
    assert (clip.begin, clip.end) == (4 * 360, 4 * 560)
    assert agvm.type == 'AGVMHook'
    assert 'clips updates 360 to 560' in printed


def test_warmup_of_another_package_is_found(make, own):
    lines = (
        'param_scheduler = [dict(type="mmdet.QuadraticWarmupLR", '
        'by_epoch=True, begin=0, end=2, convert_to_iter_based=True)]'
    )
    cfg, _, _ = make(own(lines=lines), '--batch-size', 256, '--gpus', 16)
    (warmup,) = cfg.param_scheduler
    assert warmup.end == 2 * 459  # ceil(117266 / 256)


def test_longer_warmup_of_the_original_is_kept_in_images(make, own):
    lines = (
        'param_scheduler = [dict(type="LinearLR", start_factor=0.1, '
        'by_epoch=False, begin=0, end=20000)]'
    )
    cfg, _, printed = make(own(lines=lines), '--batch-size', 256, '--gpus', 16)
    (warmup,) = cfg.param_scheduler
    assert warmup.end == 20000 * 16 // 256 > 2 * 117266 // 256
    assert 'as many images as in the original' in printed


def test_own_config_keeps_what_it_says(make, own, tmp_path):
    lines = """
optim_wrapper = dict(
    type='AmpOptimWrapper', clip_grad=dict(max_norm=35),
    paramwise_cfg=dict(norm_decay_mult=0.0))
custom_hooks = [dict(type='EMAHook')]
custom_imports = dict(imports=['json'])
train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(base_batch_size=None)
"""
    file = own(lines=lines)
    cfg, text, printed = make(
        *(file, '--batch-size', 256, '--gpus', 16, '--images', 51200),
        out=tmp_path / 'elsewhere' / 'large.py',
    )
    assert "_base_ = ['../configs/own.py']" in text
    wrapper = cfg.optim_wrapper
    assert wrapper.type == 'AGVMAmpOptimWrapper'
    assert wrapper.clip_grad.max_norm == 35
    assert wrapper.paramwise_cfg.norm_decay_mult == 0
    # 8 GPUs x 4 images, then 32 to 128 linearly, and once the square root
    assert "8 GPUs, mmdet's default, x 4 images" in printed
    assert wrapper.optimizer.lr == pytest.approx(0.02 * 4 * 2**0.5, rel=1e-3)
    assert [hook.type for hook in cfg.custom_hooks] == ['EMAHook', 'AGVMHook']
    assert cfg.custom_imports.imports == ['json', 'mmagvm']
    assert cfg.param_scheduler[0].end == 2 * 51200 // 256
    # again, over its own file
    make(file, '--batch-size', 128, '--gpus', 16, '--images', 51200)


def test_images_are_counted_where_they_lie(make, own, tmp_path):
    lines = f"""
train_dataloader = dict(dataset=dict(
    _delete_=True, type='RepeatDataset', times=3, dataset=dict(
        type='CocoDataset', ann_file={str(tmp_path / 'some.json')!r},
        data_prefix=dict(img=''), pipeline=[])))
"""
    images = [
        dict(id=i, file_name=f'{i}.png', width=9, height=9) for i in range(40)
    ]
    import json

    (tmp_path / 'some.json').write_text(
        json.dumps(dict(images=images, annotations=[], categories=[]))
    )
    _, _, printed = make(own(lines=lines), '--batch-size', 32, '--gpus', 2)
    assert '12 of 120 images, 4 iterations each' in printed
    _, _, printed = make(
        *(own(lines=lines), '--batch-size', 32, '--gpus', 2, '--images', 64)
    )
    assert '12 of 192 images, 6 iterations each' in printed


@pytest.mark.parametrize(
    'optimizer, lr, decay, paper',
    [
        ('AdamW', 1.2e-3, 0.05, True),
        ('LAMB', 5e-3, 0.05, False),
        ('LARS', 0.32, 1e-4, False),
        ('SOAP', 8e-4, 0.05, False),
        ('Muon', 1.125e-3, 0.05, False),
    ],
)
def test_optimizer_is_changed(make, optimizer, lr, decay, paper):
    if optimizer != 'AdamW':
        pytest.importorskip('pytorch_optimizer')
    cfg, _, printed = make(
        *(FASTER_RCNN, '--batch-size', 512, '--gpus', 32),
        *('--optimizer', optimizer),
    )
    found = cfg.optim_wrapper.optimizer
    assert found.type == optimizer
    assert found.lr == pytest.approx(lr, rel=1e-3)
    assert found.weight_decay == decay
    # table 3 of the appendix, of AdamW
    clipped = cfg.optim_wrapper.get('clip_grad')
    assert clipped == (None if optimizer == 'LARS' else dict(max_norm=1.0))
    assert ('not in the paper' in printed) != paper


def test_optimizer_without_agvm(make, own, tmp_path):
    """A plain wrapper of MMEngine's, and nothing that AGVM needs."""
    lines = "custom_hooks = [dict(type='EMAHook', momentum=0.001)]"
    cfg, _, output = make(
        own(lines=lines),
        *('--batch-size', '512', '--gpus', '8'),
        *('--optimizer', 'SOAP', '--no-agvm'),
    )
    wrapper = cfg.optim_wrapper
    assert wrapper.type == 'OptimWrapper'
    assert set(wrapper) - {'_scope_'} == {
        *('type', 'optimizer', 'accumulative_counts', 'clip_grad')
    }
    assert wrapper.accumulative_counts == 4
    assert wrapper.optimizer.type == 'SOAP'
    assert tuple(wrapper.optimizer.betas) == (0.8, 0.95)
    assert 'SOAP: betas (0.8, 0.95), weight_decay 0.0001 -> 0.05' in output
    assert 'half and twice this rate, for a segmenter up to 8' in output
    assert 'adds nothing' not in output
    assert [hook['type'] for hook in cfg.custom_hooks] == ['EMAHook']
    assert cfg.custom_hooks[0].momentum > 0.001
    assert cfg.custom_imports.imports == ['mmagvm']
    assert 'modules' not in output and 'AGVM' not in output
    # one GPU may take one micro-batch
    cfg, _, _ = make(
        FASTER_RCNN,
        *('--batch-size', '16', '--gpus', '1', '--no-agvm'),
        out=tmp_path / 'small.py',
    )
    assert cfg.optim_wrapper.accumulative_counts == 1


def test_agvm_cannot_be_left_out_of_an_agvm_config(make, own):
    lines = "optim_wrapper = dict(type='AGVMOptimWrapper')"
    with pytest.raises(SystemExit, match='--no-agvm: the original has'):
        make(
            own(lines=lines),
            *('--batch-size', '512', '--gpus', '8', '--no-agvm'),
        )


def test_soap_takes_the_originals_rate_for_what_it_is_to_adamw(make, own):
    pytest.importorskip('pytorch_optimizer')
    lines = (
        "optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', "
        'lr=2e-4, weight_decay=0.01))'
    )
    cfg, _, printed = make(
        *(own(lines=lines), '--batch-size', 256, '--gpus', 16),
        *('--optimizer', 'SOAP'),
    )
    # at 16 the paper's rule for AdamW has 1e-4
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(2 * 8e-4, 2e-3)
    assert 'times 2, as its 0.0002 at 16 is to the 0.0001' in printed
    assert 'half and twice this rate' in printed
    assert 'segmenter' not in printed  # its own AdamW's rate is followed
    assert cfg.optim_wrapper.optimizer.weight_decay == 0.01
    assert ', weight_decay 0.01 as in the original' in printed
    assert 'AGVM adds nothing to SOAP' in printed
    # and on from there
    recipe = (
        TOOL.parents[2]
        / 'configs/faster_rcnn/faster-rcnn_r50_fpn_16xb16-soap-12e_coco.py'
    )
    cfg, _, printed = make(recipe, '--batch-size', 1024, '--gpus', 64)
    assert cfg.optim_wrapper.optimizer.lr == 8e-4
    assert "this project's rule, by its study" in printed
    assert 'linear up to 32, then constant (' in printed


def test_advice_fits_the_module_and_the_config(make, own):
    """mmseg's heads have no norm_eval; clipped gradients need no advice."""
    lines = (
        'optim_wrapper = dict('
        'clip_grad=dict(_delete_=True, max_norm=1, norm_type=2))\n'
        "model = dict(decode_head=dict(norm_cfg=dict(type='BN')))"
    )
    base = 'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'
    _, _, printed = make(
        *(own(base, lines=lines), '--batch-size', 512, '--gpus', 32)
    )
    (advice,) = re.findall('decode_head has .* batch norm.*', printed)
    assert 'norm_cfg' in advice and 'norm_eval' not in advice
    assert 'not clipped' not in printed


@pytest.mark.parametrize(
    'arguments, suggested',
    [
        (('--batch-size', 256), True),
        (('--batch-size', 256, '--optimizer', 'AdamW'), True),
        (('--batch-size', 256, '--optimizer', 'SOAP'), False),
        (('--batch-size', 240), False),
        # shards cannot have it
        (('--batch-size', 256, '--shard'), False),
    ],
    ids=str,
)
def test_soap_is_suggested_for_a_large_batch(make, arguments, suggested):
    pytest.importorskip('pytorch_optimizer')
    _, _, printed = make(FASTER_RCNN, '--gpus', 16, *arguments)
    assert ('add --optimizer SOAP' in printed) is suggested


@pytest.mark.parametrize(
    'own_clip, kept',
    [
        ("dict(type='value', clip_value=0.5)", True),
        ('dict(max_norm=35)', True),
        ('None', False),
    ],
)
def test_clipping_of_the_original_stays(make, own, own_clip, kept):
    """Without any, SOAP's recipe clips, also small batches."""
    pytest.importorskip('pytorch_optimizer')
    file = own(lines=f'optim_wrapper = dict(clip_grad={own_clip})')
    before = Config.fromfile(file).optim_wrapper.clip_grad
    cfg, _, printed = make(
        *(file, '--batch-size', 64, '--gpus', 4, '--optimizer', 'SOAP')
    )
    after = cfg.optim_wrapper.clip_grad
    assert after == (before if kept else dict(max_norm=1.0))
    assert ('clipped as in the original: ' in printed) is kept
    assert ('norm 1, as in the recipe faster_rcnn/soap' in printed) is not kept


def test_learning_rates_in_schedulers_follow(make, own):
    pytest.importorskip('pytorch_optimizer')
    lines = """
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=99),
    dict(type='CosineAnnealingLR', begin=6, T_max=6, eta_min=1e-3),
    dict(type='CosineAnnealingMomentum', begin=6, T_max=6, eta_min=0.5)]
"""
    file = own(lines=lines)
    for optimizer, lr in (('SGD', 0.16), ('SOAP', 8e-4)):
        cfg, _, printed = make(
            *(file, '--batch-size', 128, '--gpus', 8, '--optimizer', optimizer)
        )
        _, cosine, momentum = cfg.param_scheduler
        assert cfg.optim_wrapper.optimizer.lr == lr
        assert cosine.eta_min / lr == pytest.approx(1e-3 / 0.02)
        assert momentum.eta_min == 0.5
        assert 'CosineAnnealingLR.eta_min 0.001 -> ' in printed
        assert 'Momentum.eta_min' not in printed


def test_decay_during_a_new_warmup_is_told(make):
    _, _, printed = make(
        *(SEM_FPN, '--batch-size', 512, '--gpus', 32),
        *('--base-batch-size', 32),
    )
    assert 'PolyLR already decays during the warm-up' in printed
    assert "the paper's rule for ADE20K" in printed


@pytest.mark.parametrize(
    'batch, settings, told',
    [
        # a first step after the only epoch of the warm-up
        (128, '', False),
        (256, '', True),
        (128, 'convert_to_iter_based=True', True),
        (256, 'begin=2', False),
    ],
)
def test_decay_by_epoch_during_a_new_warmup(make, own, batch, settings, told):
    lines = f"""
param_scheduler = [
    dict(type='CosineAnnealingLR', T_max=12, {settings}),
    dict(type='MultiStepLR', milestones=[8])]
"""
    _, _, printed = make(
        *(own(lines=lines), '--batch-size', batch, '--gpus', 16)
    )
    assert ('CosineAnnealingLR already decays' in printed) is told
    assert 'MultiStepLR' not in printed


@pytest.mark.parametrize(
    'old, new', [('1e-4', 4e-4), ('[1e-4, 2e-4]', [4e-4, 8e-4])]
)
def test_rates_of_each_group_follow(make, own, old, new):
    lines = f"""
param_scheduler = [
    dict(type='ReduceOnPlateauLR', monitor='loss', min_value={old})]
"""
    cfg, _, _ = make(own(lines=lines), '--batch-size', 64, '--gpus', 4)
    assert cfg.param_scheduler[-1].min_value == new


def test_training_shorter_than_any_of_the_paper_is_told(make):
    _, _, printed = make(FASTER_RCNN, '--batch-size', 131072, '--gpus', 64)
    assert 'only 11 updates in all' in printed


@pytest.mark.parametrize(
    'old, new', [('LAMB', 'AdamW'), ('LARS', 'SGD'), ('SOAP', 'Muon')]
)
def test_weight_decay_stays_in_a_family(make, own, old, new):
    pytest.importorskip('pytorch_optimizer')
    lines = (
        "optim_wrapper = dict(optimizer=dict(_delete_=True, type='%s', "
        'lr=1e-3, weight_decay=0.02))'
    )
    cfg, _, _ = make(
        own(lines=lines % old),
        *('--batch-size', 64, '--gpus', 4, '--optimizer', new),
    )
    assert cfg.optim_wrapper.optimizer.weight_decay == 0.02


def test_advice_to_leave_agvm_out_can_be_followed(make, own):
    lines = "optim_wrapper = dict(type='AGVMOptimWrapper')"
    _, _, printed = make(own(lines=lines), '--batch-size', 256, '--gpus', 16)
    assert "--no-agvm, and write optim_wrapper.type='OptimWrapper'" in printed


def test_images_without_boxes_count_unless_they_are_filtered(make, own):
    lines = (
        'train_dataloader = dict(dataset=dict(filter_cfg=dict('
        'filter_empty_gt={})))'
    )
    for filtered, images in ((True, 117266), (False, 118287)):
        _, _, printed = make(
            *(own(lines=lines.format(filtered)), '--batch-size', 64),
            *('--gpus', 4),
        )
        assert f'12 of {images} images' in printed


def test_model_inside_of_a_model_gets_fitting_advice(make):
    _, _, printed = make(
        'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_'
        'semi-0.1-coco.py',
        *('--batch-size', 320, '--gpus', 32),
    )
    (advice,) = re.findall('.* batch norm layers.*', printed)
    assert advice.startswith(
        '- student.backbone has 53 batch norm layers, fixed by norm_eval=True'
    )


def test_options_of_each_parameter_are_not_listed(make):
    """A constructor of mmseg prints them."""
    _, _, printed = make(
        'mmseg::beit/beit-large_upernet_8xb1-amp-160k_ade20k-640x640.py',
        *('--batch-size', 256, '--gpus', 32),
    )
    assert len(printed.splitlines()) < 30
    assert 'LayerDecayOptimizerConstructor still sets' in printed
    assert 'as for AdamW on COCO, since the paper has no rule' in printed


def test_sources_that_disagree_on_the_batch_are_refused(make, tmp_path):
    rtmdet = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
    with pytest.raises(
        SystemExit,
        match='base_batch_size is 16, but the name rtmdet_tiny_8xb32-300e'
        '_coco.py says 256: give --base-batch-size 16 or 256',
    ):
        make(rtmdet, '--batch-size', 512, '--gpus', 32)
    assert not (tmp_path / 'out.py').exists()
    cfg, _, _ = make(
        *(rtmdet, '--batch-size', 512, '--gpus', 32),
        *('--base-batch-size', 256),
    )
    # once x sqrt(1.5) from 256 to 512
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(
        4e-3 * 1.5**0.5, 1e-3
    )


def test_recipe_of_this_project_is_reproduced(make):
    """Except for its 16 epochs, which no tool can know."""
    recipe = Config.fromfile(
        TOOL.parents[2]
        / 'configs/faster_rcnn/faster-rcnn_r50_fpn_32xb16-agvm-16e_coco.py'
    )
    cfg, _, _ = make(FASTER_RCNN, '--batch-size', 512, '--gpus', 32)
    ours, theirs = cfg.optim_wrapper, recipe.optim_wrapper
    assert ours.optimizer == theirs.optimizer
    for setting in ('begin', 'interval', 'ema_decay', 'type', 'constructor'):
        assert ours[setting] == theirs[setting]
    assert cfg.param_scheduler[0].end == recipe.param_scheduler[0].end


@pytest.mark.parametrize('batch, begin', [(4096, 87), (10240, 36)])
def test_measuring_begins_as_in_the_recipes(make, batch, begin):
    gpus = batch // 16
    cfg, _, _ = make(FASTER_RCNN, '--batch-size', batch, '--gpus', gpus)
    assert cfg.optim_wrapper.begin == begin


def test_own_lamb_is_scaled_as_the_recipes(make):
    recipes = TOOL.parents[2] / 'configs/faster_rcnn'
    name = 'faster-rcnn_r50_fpn_{}xb16-lamb-12e_coco.py'
    cfg, _, _ = make(
        *(recipes / name.format(2), '--batch-size', 1536, '--gpus', 96)
    )
    theirs = Config.fromfile(recipes / name.format(96)).optim_wrapper
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(
        theirs.optimizer.lr, rel=1e-2
    )


# -- pure Python configs


def test_pure_python_config_is_written_in_full(make, pure_python):
    cfg, text, printed = make(
        *(pure_python(), '--batch-size', 64, '--gpus', 4),
        *('--base-batch-size', 16, '--images', 6400),
    )
    assert '\n_base_' not in text and '<class' not in text + printed
    assert cfg.model.type == 'mmdet.models.RetinaNet'
    wrapper = cfg.optim_wrapper
    assert wrapper.type == 'AGVMAmpOptimWrapper'
    assert wrapper.optimizer == dict(
        type='torch.optim.SGD', lr=0.04, momentum=0.9
    )
    warmup, decay = cfg.param_scheduler
    assert warmup.type == 'mmengine.optim.LinearLR'
    assert warmup.end == 100 and decay.milestones == [8]
    ema, agvm = cfg.custom_hooks
    assert (ema.type, agvm.type) == ('mmengine.hooks.EMAHook', 'AGVMHook')
    assert ema.momentum == pytest.approx(8e-4, rel=1e-2)
    assert 'modules: backbone, neck, bbox_head' in (printed)


def test_pure_python_config_can_change_its_optimizer(make, pure_python):
    cfg, _, printed = make(
        *(pure_python(), '--batch-size', 64, '--gpus', 4),
        *('--base-batch-size', 16, '--images', 6400, '--optimizer', 'AdamW'),
    )
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    assert 'momentum' not in cfg.optim_wrapper.optimizer
    assert 'SGD -> AdamW' in printed


def test_pure_python_config_is_planned_and_its_modules_found(
    pure_python, monkeypatch, capsys
):
    file = str(pure_python())
    options = '--gpus 4 --images-per-gpu 16 --ms-per-iter 100 --rule COCO'
    monkeypatch.setattr(sys, 'argv', ['', file, *options.split()])
    monkeypatch.setattr(sys, 'argv', [*sys.argv, '--images', '6400'])
    load_command('misc/plan_run.py').main()
    assert '1200 updates' in capsys.readouterr().out
    monkeypatch.setattr(sys, 'argv', ['', file])
    load_command('misc/list_modules.py').main()
    assert 'bbox_head' in capsys.readouterr().out


@pytest.mark.parametrize(
    'lines, message',
    [
        (
            'from toy_runner import ToyModel\n'
            'optim_wrapper.update(type=ToyModel)',
            "optim_wrapper.type='ToyModel' has no AGVM counterpart",
        ),
        (
            'from nowhere import Model\nmodel.update(type=Model)',
            'needs nowhere, which cannot be imported: install it in a version',
        ),
        (
            'from mmdet.nowhere import Model\nmodel.update(type=Model)',
            'needs mmdet.nowhere, which cannot be imported',
        ),
        (
            'optim_wrapper.update(optimizer=dict(first=dict(type=SGD)))\n'
            'optim_wrapper.optimizer.pop("type")',
            'optim_wrapper.optimizer has no type',
        ),
    ],
)
def test_unsuitable_pure_python_config_is_refused(
    make, pure_python, tmp_path, lines, message
):
    with pytest.raises(SystemExit, match=message) as refusal:
        make(pure_python(lines), '--batch-size', 64, '--gpus', 4)
    assert '<class' not in str(refusal.value)
    assert '\n' not in str(refusal.value)
    assert not (tmp_path / 'out.py').exists()


# -- what is refused


@pytest.mark.parametrize(
    'config, options, message',
    [
        ('no.py', '--batch-size 64 --gpus 8', 'no.py: no such config file'),
        ('mmdet::no/no.py', '--batch-size 64 --gpus 8', 'could not be read'),
        (FASTER_RCNN, '--batch-size 60 --gpus 8', '60 .* 8 GPUs: write 56 or'),
        (FASTER_RCNN, '--batch-size 4 --gpus 8', 'GPUs: write 8'),
        (FASTER_RCNN, '--batch-size 0 --gpus 8', 'size 0 is too small'),
        (FASTER_RCNN, '--batch-size 1 --gpus 1', 'nothing to compare'),
        (
            FASTER_RCNN,
            '--batch-size 64 --gpus 8 --optimizer Addam',
            '--optimizer Addam is unknown: write one of SGD, LARS',
        ),
        (
            FASTER_RCNN,
            '--batch-size 64 --gpus 8 --base-batch-size -16',
            '--base-batch-size -16 is too small',
        ),
    ],
)
def test_bad_arguments_are_refused(make, tmp_path, config, options, message):
    with pytest.raises(SystemExit, match=message) as refusal:
        make(config, *options.split())
    assert '\n' not in str(refusal.value)
    assert not (tmp_path / 'out.py').exists()


@pytest.mark.parametrize(
    'lines, message',
    [
        ("optim_wrapper = dict(type='ApexOptimWrapper')", 'no AGVM counterp'),
        (
            'optim_wrapper = dict(_delete_=True, first=dict(optimizer=dict('
            "type='SGD', lr=1.0)), constructor='Both')",
            r"optim_wrapper has several, \['first'\]",
        ),
        (
            "optim_wrapper = dict(constructor='LayerDecay')",
            "base_constructor='LayerDecay' in optim_wrapper is not registered",
        ),
        ("model = dict(neck=dict(type='NoNeck'))", 'model could not be built'),
        ('optim_wrapper = dict(modules=["tail"])', "'tail'.* no trainable"),
        (
            "train_dataloader = dict(dataset=dict(ann_file='no.json'))",
            'could not be counted .* write --images N',
        ),
        ('train_dataloader = None', 'the config has no train_dataloader'),
        ('optim_wrapper = dict(', 'could not be read'),
        (
            'try:\n    import nowhere\nexcept ImportError:\n    nothing',
            "could not be read: NameError: name 'nothing'",
        ),
        (
            "optim_wrapper = dict(_delete_=True, type='OptimWrapper')",
            'optim_wrapper has no optimizer: write',
        ),
    ],
)
def test_unsuitable_config_is_refused(make, own, tmp_path, lines, message):
    with pytest.raises(SystemExit, match=message) as refusal:
        make(own(lines=lines), '--batch-size', 64, '--gpus', 8)
    assert '\n' not in str(refusal.value)
    assert not (tmp_path / 'out.py').exists()


def test_file_of_somebody_else_is_not_overwritten(make, own):
    file = own()
    before = file.read_text()
    with pytest.raises(SystemExit, match='not made by this tool'):
        make(file, '--batch-size', 64, '--gpus', 8, out=file)
    assert file.read_text() == before


def test_refusal_is_one_sentence_and_exit_code_1(tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOL), 'no.py', '--batch-size=64', '--gpus=8'],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(TOOL.parents[2])),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == 'no.py: no such config file'
    assert 'Traceback' not in done.stderr


# -- in shards


def test_shard_writes_the_strategy_and_moves_settings(make, own):
    file = own(lines="activation_checkpointing = ['backbone']")
    cfg, _, output = make(file, '--batch-size', '64', '--gpus', '4', '--shard')
    assert cfg.runner_type == 'FlexibleRunner'
    assert cfg.strategy == dict(
        type='FullyShardStrategy', activation_checkpointing=['backbone']
    )
    assert not cfg.activation_checkpointing
    assert '4 shards; 16 units are gathered one at a time, from' in output
    refuse_ignored_settings(cfg)


@pytest.mark.parametrize(
    'options, lines, message',
    [
        (['--gpus', '1'], '', 'one GPU keeps the whole model'),
        (
            ['--gpus', '4', '--optimizer', 'SOAP'],
            '',
            'SOAP needs whole matrices',
        ),
        (
            ['--gpus', '4'],
            "custom_hooks = [dict(type='EMAHook')]",
            'EMAHook copies the model',
        ),
        (
            ['--gpus', '4'],
            "model = dict(backbone=dict(_delete_=True, type='SSDVGG', depth=16"
            ', out_feature_indices=(22, 34)), neck=None)',
            'units=None finds no repeated blocks',
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(make, own, options, lines, message):
    with pytest.raises(SystemExit, match=message):
        make(own(lines=lines), '--batch-size', '64', '--shard', *options)


@pytest.mark.parametrize(
    'settings, message',
    [
        (
            dict(strategy=dict(type='FullyShardStrategy')),
            "also set runner_type='FlexibleRunner'",
        ),
        (
            dict(
                runner_type='FlexibleRunner',
                activation_checkpointing=['backbone'],
            ),
            r"FullyShardStrategy', activation_checkpointing=\['backbone'\]",
        ),
        (
            dict(runner_type='FlexibleRunner', find_unused_parameters=True),
            'find_unused_parameters=True is not read by a FlexibleRunner',
        ),
    ],
)
def test_settings_that_mmengine_ignores_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        refuse_ignored_settings(Config(settings))
