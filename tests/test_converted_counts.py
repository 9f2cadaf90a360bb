"""What counts iterations, epochs or images in a config, for a large batch."""

import argparse

import pytest
from mmengine.config import Config

from mmagvm.planning.batch import Batch
from mmagvm.planning.config_reader import find_base_batch_size, load
from mmagvm.planning.counts import convert_average
from mmagvm.planning.large_batch import check
from mmagvm.planning.large_batch_config import plan
from mmagvm.planning.model_modules import package_configs
from mmagvm.planning.schedule_change import schedule


def planned(name, batch=480, gpus=32, base=None, file=None):
    """The plan for a config, without its model."""
    cfg = load(name)
    check(cfg)
    args = argparse.Namespace(
        config=file or name,
        batch_size=batch,
        gpus=gpus,
        max_images_per_gpu=16,
        base_batch_size=base,
        images=None if 'max_iters' in cfg.train_cfg else 100_000,
        optimizer=None,
        agvm=True,
    )
    return plan(cfg, args)[0]


@pytest.mark.parametrize(
    'name, base, changed, notes',
    [
        (
            'mmdet::yolox/yolox_s_8xb8-300e_coco.py',
            64,
            dict(momentum=7.498e-4, gamma=267),
            [
                'BatchSyncRandomResize].interval=10',
                'log_processor.window_size=50; they count iterations',
                'as the number of epochs stays: ',
                'YOLOXModeSwitchHook].num_last_epochs=15',
                '62700 iterations',
            ],
        ),
        (
            'mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py',
            16,
            dict(momentum=5.983e-3, gamma=67),
            ['PipelineSwitchHook].switch_epoch=280', '[(280, 1)]'],
        ),
        (
            'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_'
            '180k_semi-0.1-coco.py',
            40,
            dict(momentum=1.193e-2),
            ['180000 -> 15000 iterations', 'GroupMultiSourceSampler makes'],
        ),
        (
            'mmdet::dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py',
            16,
            {},
            ['dynamic_rcnn.update_iter_interval=100'],
        ),
        (
            'mmdet::tood/tood_r50_fpn_1x_coco.py',
            16,
            {},
            ['model.train_cfg.initial_epoch=4'],
        ),
        (
            'mmseg::emanet/emanet_r50-d8_4xb2-80k_cityscapes-512x1024.py',
            8,
            {},
            ['to be checked: model.decode_head.momentum=0.1; they count'],
        ),
    ],
    ids=['YOLOX', 'RTMDet', 'SoftTeacher', 'DynamicRCNN', 'TOOD', 'EMANet'],
)
def test_what_counts_is_converted_or_named(name, base, changed, notes):
    result = planned(name, base=base)
    hooks = result.diff['custom_hooks']
    averages = [hook for hook in hooks if 'momentum' in hook]
    assert len(averages) == bool(changed)
    for key, value in changed.items():
        assert averages[0][key] == pytest.approx(value, rel=1e-3)
    text = ' '.join(result.reasons)
    for part in notes:
        assert part in text


def test_sampler_makes_batches_as_large(own):
    name = (
        'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_'
        'semi-0.1-coco.py'
    )
    loader = planned(name, base=40).diff['train_dataloader']
    assert loader == dict(batch_size=15, sampler=dict(batch_size=15))
    with pytest.raises(ValueError, match=r'source_ratio=\[1, 4\] of .* of 5'):
        planned(name, batch=512, base=40)


def test_dynamic_intervals_of_iterations():
    name = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
    train = planned(name, batch=160, gpus=10, base=16).diff['train_cfg']
    assert train['max_iters'] == 36875
    assert train['dynamic_intervals'] == [(36500, 36875)]


def test_iterations_of_a_config_that_accumulates():
    """Its iterations have fewer images than its batch."""
    name = 'mmseg::beit/beit-large_upernet_8xb1-amp-160k_ade20k-640x640.py'
    cfg = load(name)
    assert cfg.optim_wrapper.accumulative_counts == 2
    result = planned(name, batch=160, gpus=10)
    assert cfg.train_cfg.max_iters == 320_000  # of 8 images
    assert result.diff['train_cfg']['max_iters'] == 16_000


def test_decay_of_each_iteration_is_converted():
    batch = Batch(64, 4, 16, 1, 16)
    old = dict(type='ExponentialLR', by_epoch=False, gamma=0.99)
    _, new = schedule([old], None, batch, 5, None)
    assert new['gamma'] == pytest.approx(0.99**4, rel=1e-5)
    old = dict(old, by_epoch=True)
    assert schedule([old], None, batch, 5, 10.0)[1]['gamma'] == 0.99


def test_moving_average_forgets_as_fast():
    hook = dict(type='EMAHook', begin_iter=800, ema_type='ExpMomentumEMA')
    new, note = convert_average(hook, 4)
    assert new['momentum'] == pytest.approx(1 - 0.9998**4, rel=1e-3)
    assert (new['gamma'], new['begin_iter']) == (500, 200)
    assert 'begin_iter 800 -> 200' in note
    assert convert_average(hook, 1) is None
    assert convert_average(dict(type='CheckInvalidLossHook'), 4) is None


def test_hooks_of_others_are_named(own):
    lines = (
        "custom_hooks = [dict(type='UnfreezeHook', unfreeze_iter=3000, "
        'unfreeze_epoch=2, width=7)]'
    )
    text = ' '.join(planned(str(own(lines=lines))).reasons)
    assert 'custom_hooks[0: UnfreezeHook].unfreeze_iter=3000, ' in text
    _, epochs = text.split('as the number of epochs stays: ')
    assert '0: UnfreezeHook].unfreeze_epoch=2' in epochs
    assert 'width' not in text
    # chosen, though as it was
    name = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
    text = ' '.join(planned(name, batch=128, gpus=64).reasons)
    assert 'window_size=50' in text and 'batch_size=2' not in text
    # as many images in each iteration
    assert 'to be checked' not in ' '.join(planned(name, 16, 8).reasons)
    file = str(
        own(lines='train_dataloader=dict(batch_sampler=dict(batch_size=3))')
    )
    reasons = planned(file, 16, 4, 16).reasons
    (note,) = [reason for reason in reasons if 'checked' in reason]
    assert (
        'to be checked: train_dataloader.batch_sampler.batch_size=3;' in note
    )


@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
@pytest.mark.slow
def test_every_config_is_planned_or_refused(package):
    """Each has a sentence; takes about half a minute."""
    planned_ones = 0
    for path in sorted(package_configs(package).rglob('*.py')):
        if '_base_' in path.parts:
            continue
        try:
            planned(str(path))
        except ValueError as error:
            if '--base-batch-size' in str(error):
                planned(str(path), base=16)
            assert '\n' not in str(error), path
        else:
            planned_ones += 1
    assert planned_ones > 600


def test_what_follows_a_warmup_follows_the_new_one():
    """With epochs: an odd accumulation does not add one."""
    warmup = dict(type='LinearLR', start_factor=0.1, begin=0, end=1)
    cosine = dict(type='CosineAnnealingLR', begin=1, end=12, T_max=11)
    batch = Batch(512, 2, 16, 16, 16)
    ours, after = schedule([warmup, cosine], 0, batch, 230, 229.5)
    assert (ours['by_epoch'], ours['end']) == (False, 230 * 16)
    assert (after['begin'], after['T_max']) == (1, 11)
    _, after = schedule([warmup, cosine], 0, batch, 460, 230)
    assert (after['begin'], after['T_max']) == (2, 10)


def test_all_that_counts_iterations_is_scaled():
    batch = Batch(64, 4, 16, 1, 16)
    once = dict(type='OneCycleLR', by_epoch=False, total_steps=4000)
    restarts = dict(type='CosineRestartLR', by_epoch=False, periods=[400, 800])
    _, once, restarts = schedule([once, restarts], None, batch, 5, None)
    assert once['total_steps'] == 1000
    assert restarts['periods'] == [100, 200]


def test_accumulation_of_the_original_counts():
    cfg = Config(
        dict(
            train_dataloader=dict(batch_size=2),
            auto_scale_lr=dict(base_batch_size=16),
            optim_wrapper=dict(accumulative_counts=4),
        )
    )
    size, source = find_base_batch_size('mmdet::any.py', cfg)
    assert size == 64 and 'x 4 accumulated micro-batches' in source
