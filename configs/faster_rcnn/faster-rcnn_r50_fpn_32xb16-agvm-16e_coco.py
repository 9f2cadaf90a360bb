# Batch 512 of the paper: appendix A.5, table 1. SyncBN, epochs 12 and 14 of
# decay and the start of measuring, 100 iterations after warm-up, are those of
# the official code; the shape of warm-up, linear from 0.001, is mmdet's.
_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    '../_base_/agvm.py',
]
model = dict(
    backbone=dict(
        norm_cfg=dict(type='SyncBN', requires_grad=True), norm_eval=False
    )
)
train_dataloader = dict(batch_size=16, num_workers=8)
# one epoch is ceil(117266 / 512) = 230 iterations
optim_wrapper = dict(
    **_base_.agvm,
    optimizer=dict(type='SGD', lr=0.32, momentum=0.9, weight_decay=1e-4),
    begin=560,
)
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=460
    ),
    dict(
        type='MultiStepLR',
        begin=0,
        end=16,
        by_epoch=True,
        milestones=[12, 14],
        gamma=0.1,
    ),
]
train_cfg = dict(max_epochs=16)
