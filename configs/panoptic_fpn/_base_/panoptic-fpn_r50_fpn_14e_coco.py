# Panoptic FPN with SGD, of any batch size. Norm layers and images per GPU are
# those of the official code.
_base_ = [
    'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
    '../../_base_/recipe.py',
]
model = dict(backbone=_base_.synchronized)
train_dataloader = _base_.train_dataloader_16
# 14 epochs by the project page's iterations; when to decay is not in the paper
decay = dict(
    type='MultiStepLR', by_epoch=True, end=14, milestones=[10, 12], gamma=0.1
)
train_cfg = dict(max_epochs=14)
# mmdet reads panoptic annotations by panopticapi, which is on no index;
# training needs only these transforms, and PQ is left to tools/test.py
train_dataloader.update(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='LoadPanopticSegments'),
            dict(type='Resize', scale=(1333, 800), keep_ratio=True),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs'),
        ]
    )
)
val_dataloader = None
val_cfg = None
val_evaluator = None
