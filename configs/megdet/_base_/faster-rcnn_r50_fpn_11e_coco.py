# MegDet's "normal" policy; the detector and the length of warm-up, which are
# not in its paper, are mmdet's.
_base_ = [
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    '../../_base_/recipe.py',
]
decay = dict(
    type='MultiStepLR', by_epoch=True, end=11, milestones=[8, 10], gamma=0.1
)
param_scheduler = [dict(_base_.warmup, end=500), decay]
# running statistics of all groups become their mean after each epoch
custom_hooks = [dict(type='SyncBuffersHook')]
train_cfg = dict(max_epochs=11)
