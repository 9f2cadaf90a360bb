"""HTC-X: its configs at full size on the meta device, and a small training."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from commands import ROOT, run
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmagvm.core import find_modules
from mmagvm.launch.runner import refuse_ignored_settings

FOLDER = ROOT / 'configs/htc_x'
FILES = sorted(file.name for file in FOLDER.glob('*.py'))
DETECTORS = [file for file in FILES if file.startswith('htc-x')]
#: Of UniNet-G's detector, by the facts of the paper and of public code.
MODULES = {
    'backbone',
    'neck',
    'rpn_head',
    'roi_head.bbox_head',
    'roi_head.glbctx_head',
}


@pytest.fixture(scope='module')
def models():
    """Models by number of classes and by masks, each built once."""
    return {}


def on_meta(cfg):
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS

    import mmagvm.models  # noqa: F401

    init_default_scope('mmdet')
    with torch.device('meta'):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize('file', DETECTORS)
def test_config_is_built_at_full_size(file):
    cfg = Config.fromfile(FOLDER / file)
    refuse_ignored_settings(cfg)
    model = on_meta(cfg)
    classes = 365 if 'objects365' in file else 80
    assert model.roi_head.bbox_head[0].fc_cls.out_features == classes + 1
    modules = set(find_modules(model))
    masks = {'roi_head.mask_head'} if 'mask' in file else set()
    assert modules == MODULES | masks
    assert ('shard' in file) == (cfg.get('runner_type') == 'FlexibleRunner')
    assert ('agvm' in file) == (cfg.optim_wrapper.type == 'AGVMOptimWrapper')
    count = sum(p.numel() for p in model.parameters())
    assert 1.19e9 < count < 1.23e9


@pytest.mark.parametrize(
    'file, batch, updates',
    [
        ('htc-x_uninet-g_480xb2-agvm-adamw-11e_coco.py', 960, 1353),
        ('htc-x_uninet-g_32xb2-adamw-20e_objects365v1.py', 64, 199380),
    ],
)
def test_length_is_the_papers(file, batch, updates):
    cfg = Config.fromfile(FOLDER / file)
    images = 638000 if 'objects365' in file else 117266
    gpus = int(file.split('_')[2].split('xb')[0])
    assert gpus * cfg.train_dataloader.batch_size == batch
    epochs = cfg.train_cfg.max_epochs
    assert -(-images // batch) * epochs == pytest.approx(updates, abs=20)


def test_scales_are_the_papers():
    cfg = Config.fromfile(
        FOLDER / 'htc-x_uninet-g_480xb2-agvm-adamw-11e_coco.py'
    )
    (resize,) = [
        step
        for step in cfg.train_dataloader.dataset.pipeline
        if 'Resize' in step['type']
    ]
    assert {long for long, _ in resize['scales']} == {1600}
    sides = [short for _, short in resize['scales']]
    assert (min(sides), max(sides)) == (400, 1200)
    ious = [stage.assigner.pos_iou_thr for stage in cfg.model.train_cfg.rcnn]
    assert ious == [0.6, 0.7, 0.8]
    assert cfg.optim_wrapper.optimizer.lr == 1.5e-4
    assert cfg.optim_wrapper.begin == cfg.param_scheduler[0].end + 100


@pytest.mark.skipif(
    find_spec('mmpretrain') is None, reason='mmpretrain is not installed'
)
def test_pre_training_is_built():
    from mmpretrain.registry import MODELS

    cfg = Config.fromfile(FOLDER / 'uninet-g_640xb8-150e_in22k.py')
    with torch.device('meta'):
        MODELS.build(cfg.model)


# -- a small one, of the same parts


def small_cfg(digits, work_dir, **changes):
    """Some 2 million parameters, on digits with boxes and masks."""
    cfg = Config.fromfile(
        FOLDER / 'htc-x-mask_uninet-g_480xb2-agvm-adamw-11e_coco.py'
    )
    channels, norm = 32, dict(type='BN')
    model = cfg.model
    model.data_preprocessor.update(
        mean=[127.0] * 3, std=[64.0] * 3, pad_size_divisor=32
    )
    stages = [
        dict(block='fused_mbconv', expansion=1, channels=16, depth=1),
        dict(
            block='fused_mbconv', expansion=2, channels=24, depth=2, stride=2
        ),
        dict(
            block='fused_mbconv', expansion=2, channels=32, depth=2, stride=2
        ),
        dict(
            block='transformer',
            expansion=2,
            channels=64,
            depth=3,
            stride=2,
            windows=(4, 4, 0),
        ),
    ]
    model.backbone.update(
        arch=dict(stem=16, stages=stages),
        out_indices=(1, 2, 3),
        head_dim=8,
        norm_cfg=norm,
        layer_scale=0.1,
        drop_path_rate=0.0,
        with_cp=False,
    )
    rcnet, sepc = model.neck
    rcnet.update(
        in_channels=[24, 32, 64],
        out_channels=channels,
        num_outs=4,
        num_stages=1,
        norm_cfg=norm,
        conv_cfg=None,  # deformable ones take their time on a CPU
    )
    sepc.update(
        in_channels=channels,
        out_channels=channels,
        num_convs=1,
        norm_cfg=norm,
        conv_cfg=None,
    )
    model.rpn_head.update(in_channels=channels, feat_channels=channels)
    model.rpn_head.anchor_generator.update(
        scales=[4], ratios=[1.3], strides=[4, 8, 16, 32]
    )
    roi_head = model.roi_head
    for name in ('bbox_roi_extractor', 'mask_roi_extractor'):
        roi_head[name].update(
            out_channels=channels, featmap_strides=[4, 8], finest_scale=24
        )
        roi_head[name].roi_layer.sampling_ratio = 1
    for head in roi_head.bbox_head:
        head.update(
            in_channels=channels,
            num_blocks=1,
            head_dim=8,
            num_classes=10,
            with_cp=False,
        )
    roi_head.glbctx_head.update(
        in_channels=channels, conv_out_channels=channels, num_classes=10
    )
    roi_head.mask_head.update(
        in_channels=channels, conv_out_channels=16, num_convs=1, num_classes=10
    )
    model.train_cfg.rpn_proposal.update(nms_pre=100, max_per_img=50)
    for stage in model.train_cfg.rcnn:
        stage.sampler.num = 32
    model.test_cfg.rpn.update(nms_pre=100, max_per_img=50)
    model.test_cfg.rcnn.max_per_img = 20
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(96, 96), keep_ratio=True),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='PackDetInputs'),
    ]
    for split, batch in (('train', 8), ('val', 16)):
        loader = cfg[f'{split}_dataloader']
        loader.update(
            batch_size=batch, num_workers=0, persistent_workers=False
        )
        loader.pop('batch_sampler', None)
        loader.dataset.update(
            data_root=f'{digits}/',
            metainfo=dict(classes=tuple('0123456789')),
            ann_file=f'annotations/{split}.json',
            data_prefix=dict(img=f'{split}/'),
            pipeline=pipeline,
        )
    cfg.val_evaluator.ann_file = f'{digits}/annotations/val.json'
    cfg.test_dataloader, cfg.test_evaluator = (
        cfg.val_dataloader,
        cfg.val_evaluator,
    )
    cfg.load_from = None
    cfg.train_cfg.update(max_epochs=10, val_interval=10)
    cfg.param_scheduler[0].end = 30
    cfg.param_scheduler[1].update(milestones=[8], end=10)
    cfg.optim_wrapper.optimizer.lr = 4e-3
    cfg.optim_wrapper.clip_grad.max_norm = 10
    cfg.optim_wrapper.update(begin=30, interval=10)
    cfg.randomness = dict(seed=0)
    cfg.update(changes)
    path = Path(f'{work_dir}.py')
    cfg.dump(path)
    return path


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data') / 'digits'
    run(
        *(sys.executable, 'tools/dataset_converters/digits2coco.py', folder),
        *('--train', 400, '--val', 40),
    )
    return folder


def test_small_one_trains_on_two_ranks(digits, tmp_path):
    """Every module is measured and modulated; boxes and masks are learnt."""
    work_dir = tmp_path / 'small'
    run(
        *('bash', 'tools/dist_train.sh', small_cfg(digits, work_dir), 2),
        *('--work-dir', work_dir),
    )
    text = next(work_dir.glob('*/vis_data/scalars.json')).read_text()
    logged = [json.loads(line) for line in text.splitlines()]
    losses = [line['loss'] for line in logged if 'loss' in line]
    assert losses[-1] < 0.6 * losses[0]
    (evaluated,) = [line for line in logged if 'coco/bbox_mAP' in line]
    assert evaluated['coco/bbox_mAP'] > 0.03
    assert evaluated['coco/segm_mAP'] > 0.01
    last = [line for line in logged if 'loss' in line][-1]
    for module in MODULES | {'roi_head.mask_head'}:
        assert 0 < last[f'agvm_variance/{module}'] <= 2
        scale = last[f'agvm_lr_scale/{module}']
        assert (scale == 1) == (module == 'backbone')
