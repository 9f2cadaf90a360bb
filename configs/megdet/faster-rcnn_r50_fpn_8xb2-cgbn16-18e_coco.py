# batch 16, BN size 16; an epoch is 7330 iterations
_base_ = './_base_/faster-rcnn_r50_fpn_18e_coco.py'
model = dict(
    backbone=dict(
        norm_cfg=dict(type='CGBN', bn_size=16),
        norm_eval=False,
    )
)
train_dataloader = dict(batch_size=2, num_workers=2)
optim_wrapper = dict(optimizer=dict(lr=0.02))
auto_scale_lr = dict(base_batch_size=16)
