"""One recipe of every folder trains a small model on digits."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import load_checkpoint, run
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from mmengine.runner import Runner

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / 'configs'
IMAGES, BATCH = 24, 2

#: A ResNet-18 with an eighth of the channels, and heads to match.
BACKBONE = dict(depth=18, base_channels=8, frozen_stages=-1, init_cfg=None)
CHANNELS = [8, 16, 32, 64]
ANCHORS = dict(anchor_generator=dict(scales=[4]))
DETECTOR = dict(
    backbone=BACKBONE,
    neck=dict(in_channels=CHANNELS, out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16, **ANCHORS),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes=10),
    ),
)
MASKS = dict(
    roi_head=dict(
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(
            num_convs=1, in_channels=16, conv_out_channels=16, num_classes=10
        ),
    )
)
CLASSES = dict(num_things_classes=10, num_stuff_classes=1)
#: By config: what makes its model small.
SMALL = {
    'faster_rcnn/faster-rcnn_r50_fpn_2xb16-agvm-16e_coco.py': [DETECTOR],
    'mask_rcnn/mask-rcnn-align_r50_fpn_16xb16-agvm-16e_coco.py': [
        DETECTOR,
        MASKS,
    ],
    'retinanet/retinanet_r18_fpn_256xb16-agvm-14e_coco.py': [
        dict(
            backbone=BACKBONE,
            neck=dict(in_channels=CHANNELS, out_channels=16),
            bbox_head=dict(in_channels=16, feat_channels=16, num_classes=10),
        )
    ],
    'panoptic_fpn/panoptic-fpn_r50_fpn_2xb16-agvm-14e_coco.py': [
        DETECTOR,
        MASKS,
        dict(
            semantic_head=dict(
                CLASSES,
                in_channels=16,
                inner_channels=16,
                norm_cfg=dict(num_groups=4),
            ),
            panoptic_fusion_head=CLASSES,
        ),
    ],
    'sem_fpn/fpn_r50_2xb16-agvm-160k_ade20k-512x512.py': [
        dict(
            data_preprocessor=dict(size=(96, 96)),
            pretrained=None,
            backbone=dict(depth=18, base_channels=8),
            neck=dict(in_channels=CHANNELS, out_channels=16),
            decode_head=dict(in_channels=[16] * 4, channels=16),
        )
    ],
    'megdet/faster-rcnn_r50_fpn_8xb2-cgbn2-11e_coco.py': [DETECTOR],
    'ablations/faster-rcnn_r50_2xb16-10rois-fixed-head-measure-16e_coco.py': [
        dict(
            backbone=BACKBONE,
            rpn_head=dict(in_channels=64, feat_channels=16),
            roi_head=dict(
                bbox_roi_extractor=dict(out_channels=64),
                bbox_head=dict(
                    in_channels=64, fc_out_channels=32, num_classes=10
                ),
            ),
        )
    ],
}


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('data') / 'digits'
    subprocess.run(
        [
            *(
                sys.executable,
                ROOT / 'tools/dataset_converters/digits2coco.py',
            ),
            *(out_dir, '--train', str(IMAGES), '--val', '4'),
        ],
        check=True,
    )
    return out_dir


def dataset_cfg(file, digits):
    if file.startswith('sem_fpn'):
        return dict(
            data_root=str(digits),
            img_suffix='.png',
            data_prefix=dict(img_path='train', seg_map_path='semantic_train'),
        )
    things = tuple('0123456789')
    if file.startswith('panoptic'):
        return dict(
            data_root=f'{digits}/',
            metainfo=dict(
                classes=(*things, 'ground'),
                thing_classes=things,
                stuff_classes=('ground',),
            ),
            ann_file='annotations/panoptic_train.json',
            data_prefix=dict(img='train/', seg='panoptic_train/'),
        )
    return dict(
        data_root=f'{digits}/',
        metainfo=dict(classes=things),
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
    )


def epochs_of(file):
    """More epochs for the two slowest, with one level or focal loss."""
    return 8 if file.startswith(('retinanet', 'ablations')) else 3


def small_cfg(file, digits, work_dir):
    cfg = Config.fromfile(CONFIGS / file)
    for part in SMALL[file]:
        cfg.merge_from_dict(dict(model=part))
    cfg.merge_from_dict(
        dict(
            train_dataloader=dict(
                batch_size=BATCH,
                num_workers=0,
                persistent_workers=False,
                dataset=dataset_cfg(file, digits),
            )
        )
    )
    for transform in cfg.train_dataloader.dataset.pipeline:
        for size in ('scale', 'crop_size'):
            if size in transform:
                transform[size] = (96, 96)
    for name in ('val', 'test'):
        for part in ('dataloader', 'evaluator', 'cfg'):
            cfg[f'{name}_{part}'] = None
    # as long as the data, and soon at the full learning rate
    cfg.param_scheduler[0].end = 4
    if 'max_iters' in cfg.train_cfg:
        cfg.train_cfg.max_iters = epochs_of(file) * IMAGES // BATCH
    else:
        cfg.train_cfg.max_epochs = epochs_of(file)
    cfg.optim_wrapper.optimizer.lr = 0.03
    cfg.optim_wrapper.clip_grad = dict(max_norm=10)
    if cfg.optim_wrapper.type == 'AGVMOptimWrapper':
        cfg.optim_wrapper.update(accumulative_counts=2, begin=2, interval=2)
    cfg.randomness = dict(seed=0)
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = str(work_dir).replace('/', '_')
    return cfg


class Watch(Hook):
    """Records the initial weights, and all losses."""

    def __init__(self):
        self.values = []

    def before_train(self, runner):
        self.weights = {
            name: param.detach().clone()
            for name, param in runner.model.named_parameters()
        }

    def after_train_iter(self, runner, batch_idx, data_batch, outputs):
        self.values.append(float(outputs['loss']))


@pytest.mark.parametrize('file', SMALL, ids=lambda file: file.split('/')[0])
def test_recipe_trains(file, digits, tmp_path):
    if 'cgbn' in file and MODELS.get('CGBN') is None:
        pytest.skip('CGBN is not registered')
    if file.startswith('panoptic'):
        assert find_spec('panopticapi') is None, 'else this shows nothing'
    cfg = small_cfg(file, digits, tmp_path)
    init_default_scope(cfg.default_scope)
    watch = Watch()
    runner = Runner.from_cfg(cfg)
    runner.register_hook(watch)
    runner.train()

    epoch = IMAGES // BATCH
    assert len(watch.values) == epochs_of(file) * epoch
    assert np.isfinite(watch.values).all()
    first, last = watch.values[:epoch], watch.values[-epoch:]
    assert np.mean(last) < 0.95 * np.mean(first)
    still = {
        name
        for name, param in runner.model.named_parameters()
        if torch.equal(param, watch.weights[name])
    }
    head = {name for name in watch.weights if 'bbox_head' in name}
    assert still == (head if 'fixed-head' in file else set())
    if 'agvm' in file or 'measure' in file:
        modulator = runner.optim_wrapper.modulator
        assert modulator.measured == len(watch.values) // 4 - 1
        assert all(0 < phi <= 2 for phi in modulator.variance.values())


def test_recipe_trains_on_two_ranks(digits, tmp_path):
    """By the whole command, since the Runner reads more settings there."""
    cfg = small_cfg(
        'faster_rcnn/faster-rcnn_r50_fpn_2xb16-agvm-16e_coco.py',
        digits,
        tmp_path / 'run',
    )
    cfg.model.backbone.norm_cfg = dict(type='BN')  # SyncBN needs a GPU
    cfg.optim_wrapper.accumulative_counts = 1
    cfg.train_cfg.max_epochs = 1
    cfg.pop('experiment_name')
    cfg.dump(tmp_path / 'config.py')
    output = run('bash', 'tools/dist_train.sh', tmp_path / 'config.py', 2)
    assert 'Saving checkpoint at 1 epochs' in output
    state = load_checkpoint(tmp_path / 'run/epoch_1.pth')
    assert state['optimizer']['agvm']['measured'] > 0


def test_panoptic_segments_are_read_as_they_were_drawn(digits):
    init_default_scope('mmdet')
    from mmdet.registry import DATASETS

    cfg = Config.fromfile(
        CONFIGS / 'panoptic_fpn/panoptic-fpn_r50_fpn_2xb16-14e_coco.py'
    )
    dataset = DATASETS.build(
        dict(
            cfg.train_dataloader.dataset,
            **dataset_cfg('panoptic', digits),
            pipeline=cfg.train_dataloader.dataset.pipeline[:3],
        )
    )
    instances = DATASETS.build(
        dict(
            type='CocoDataset',
            **dataset_cfg('faster', digits),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            ],
        )
    )
    assert len(dataset) == len(instances) == IMAGES
    for index in range(4):
        found, expected = dataset[index], instances[index]
        labels = expected['gt_bboxes_labels']
        assert found['gt_bboxes_labels'].tolist() == labels.tolist()
        assert torch.equal(
            found['gt_bboxes'].tensor, expected['gt_bboxes'].tensor
        )
        masks = found['gt_masks'].to_ndarray()
        assert (masks == expected['gt_masks'].to_ndarray()).all()
        semantic = np.full(masks.shape[1:], 10)
        for label, mask in zip(labels, masks):
            semantic[mask > 0] = label
        assert (found['gt_seg_map'] == semantic).all()
        # ink fills a good part of its box and nothing outside of it
        x1, y1, x2, y2 = map(int, found['gt_bboxes'].tensor[0].tolist())
        assert masks[0][y1:y2, x1:x2].sum() == masks[0].sum() > 0


def test_void_is_ignored(tmp_path):
    import cv2

    # BGR: segment 1 + 2 * 256 + 3 * 65536, and pixels of no segment
    image = np.zeros((2, 3, 3), np.uint8)
    image[0, 1] = (3, 2, 1)
    cv2.imwrite(str(tmp_path / 'map.png'), image)
    results = TRANSFORMS.build(dict(type='LoadPanopticSegments'))(
        dict(
            seg_map_path=str(tmp_path / 'map.png'),
            segments_info=[
                dict(id=1 + 512 + 3 * 65536, category=7, is_thing=True)
            ],
        )
    )
    assert results['gt_seg_map'].tolist() == [[255, 7, 255], [255] * 3]
    assert results['gt_masks'].to_ndarray().tolist() == [
        [[0, 1, 0], [0, 0, 0]]
    ]
