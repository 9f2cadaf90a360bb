# A Faster R-CNN small enough for two CPU cores, on handwritten digits made by
# tools/dataset_converters/digits2coco.py; everything else is mmdet's.
_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    '../_base_/agvm.py',
]
model = dict(
    data_preprocessor=dict(
        mean=[127.0] * 3, std=[64.0] * 3, pad_size_divisor=32
    ),
    backbone=dict(
        depth=18,
        num_stages=3,
        out_indices=(0, 1, 2),
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        base_channels=16,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[16, 32, 64], out_channels=32, num_outs=3),
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(scales=[4], ratios=[1.3], strides=[4, 8, 16]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=32,
            featmap_strides=[4, 8, 16],
            finest_scale=24,
            roi_layer=dict(sampling_ratio=1),
        ),
        bbox_head=dict(in_channels=32, fc_out_channels=128, num_classes=10),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=100, max_per_img=50),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=100, max_per_img=50), rcnn=dict(max_per_img=20)
    ),
)

data_root = 'data/digits/'
metainfo = dict(classes=tuple('0123456789'))
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    batch_sampler=None,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        pipeline=pipeline,
    ),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/'),
        pipeline=pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=4, val_interval=4)
optim_wrapper = dict(
    **_base_.agvm,
    optimizer=dict(lr=0.04),
    begin=60,
    clip_grad=dict(max_norm=10),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=60),
    dict(type='MultiStepLR', by_epoch=True, milestones=[3], gamma=0.1),
]
default_hooks = dict(
    logger=dict(interval=10), checkpoint=dict(max_keep_ckpts=1)
)
randomness = dict(seed=0)
