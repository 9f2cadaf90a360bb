# Faster R-CNN with SGD, of any batch size. Norm layers, images per GPU and
# epochs of decay are those of the official code.
_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    '../../_base_/recipe.py',
]
model = dict(backbone=_base_.synchronized)
train_dataloader = _base_.train_dataloader_16
decay = dict(
    type='MultiStepLR', by_epoch=True, end=16, milestones=[12, 14], gamma=0.1
)
train_cfg = dict(max_epochs=16)
