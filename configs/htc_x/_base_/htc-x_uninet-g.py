# HTC-X with UniNet-G (AGVM, appendix A.5.2): everything but data and schedule.
# Marked "own": in no source, see docs/billion.md.
_base_ = [
    '../../_base_/mmagvm.py',
    'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
]
custom_imports = dict(
    imports=['mmagvm', 'mmagvm.models'], allow_failed_imports=False
)
channels = 384
synchronized = dict(type='SyncBN', requires_grad=True)
# 4 blocks for the class and 4 for the box; heads, ratio and pooling: own
bbox_head = dict(
    type='TransformerBBoxHead',
    in_channels=channels,
    num_blocks=4,
    mlp_ratio=4,
    with_cp=True,
    num_classes=80,
    reg_class_agnostic=True,
    reg_decoded_bbox=True,
    loss_cls=dict(type='CrossEntropyLoss', loss_weight=1.0),
    loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
)
coder = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4)
rcnn = dict(
    sampler=dict(
        type='RandomSampler',
        num=512,
        pos_fraction=0.25,
        neg_pos_ub=-1,
        add_gt_as_proposals=True,
    ),
    pos_weight=-1,
    debug=False,
)
assigner = dict(
    type='MaxIoUAssigner', match_low_quality=False, ignore_iof_thr=-1
)
model = dict(
    backbone=dict(
        _delete_=True,
        type='UniNet',
        arch='G',
        drop_path_rate=0.3,
        norm_cfg=synchronized,
        with_cp=True,
    ),
    neck=[
        # P6 to P8 by strided convolutions; P8, and RevFP on P3 to P5: own
        dict(
            type='RCNet',
            in_channels=[384, 576, 1152],
            out_channels=channels,
            num_outs=6,
            norm_cfg=synchronized,
        ),
        dict(
            type='SEPC',
            in_channels=channels,
            out_channels=channels,
            norm_cfg=synchronized,
        ),
    ],
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(
            scales=[4],  # own: 32 to 1024 pixels
            strides=[8, 16, 32, 64, 128, 256],
        ),
    ),
    roi_head=dict(
        type='HTCLiteRoIHead',
        bbox_roi_extractor=dict(
            out_channels=channels,
            featmap_strides=[8, 16, 32, 64],
            finest_scale=112,
        ),
        bbox_head=[
            dict(
                bbox_head,
                bbox_coder=dict(
                    coder, target_stds=[0.1 / n, 0.1 / n, 0.2 / n, 0.2 / n]
                ),
            )
            for n in (1, 2, 3)
        ],
        # mmdet's for SCNet: own
        glbctx_head=dict(
            type='GlobalContextHead',
            in_channels=channels,
            conv_out_channels=channels,
            num_classes=80,
            loss_weight=3.0,
        ),
    ),
    train_cfg=dict(
        rcnn=[
            dict(
                rcnn,
                # the negative threshold: own, that of positives
                assigner=dict(
                    assigner, pos_iou_thr=iou, neg_iou_thr=iou, min_pos_iou=iou
                ),
            )
            for iou in (0.6, 0.7, 0.8)
        ]
    ),
)
# short side 400 to 1200, long side at most 1600
scales = [(1600, side) for side in range(400, 1201, 32)]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomChoiceResize', scales=scales, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
# own: the size of evaluation is in no source
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(1600, 960), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=(
            *('img_id', 'img_path', 'ori_shape', 'img_shape'),
            'scale_factor',
        ),
    ),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
# own but for the rates: the paper's settings of AdamW at 1024 (appendix)
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type='AdamW',
        lr=1.5e-4,
        betas=(0.9, 0.999),
        weight_decay=0.05,
    ),
    clip_grad=dict(max_norm=1.0, norm_type=2),
)
