# MegDet's "long" policy.
_base_ = './faster-rcnn_r50_fpn_11e_coco.py'
param_scheduler = [
    _base_.param_scheduler[0],
    dict(_base_.decay, end=18, milestones=[11, 14]),
    dict(_base_.decay, end=18, milestones=[17], gamma=0.5),
]
train_cfg = dict(max_epochs=18)
