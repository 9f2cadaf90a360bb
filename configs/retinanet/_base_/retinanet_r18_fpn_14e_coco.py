# RetinaNet R18 with SGD, of any batch size. Norm layers and images per GPU are
# those of the official code.
_base_ = [
    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
    '../../_base_/recipe.py',
]
model = dict(backbone=_base_.synchronized)
train_dataloader = _base_.train_dataloader_16
# length and decay are not in the paper: as R50's
decay = dict(
    type='MultiStepLR', by_epoch=True, end=14, milestones=[10, 12], gamma=0.1
)
train_cfg = dict(max_epochs=14)
