# batch 128, BN size 32; an epoch is 917 iterations
_base_ = './_base_/faster-rcnn_r50_fpn_18e_coco.py'
model = dict(
    backbone=dict(
        norm_cfg=dict(type='CGBN', bn_size=32),
        norm_eval=False,
        with_cp=True,  # to fit into memory
    )
)
train_dataloader = dict(batch_size=4, num_workers=4)
optim_wrapper = dict(optimizer=dict(lr=0.16))
auto_scale_lr = dict(base_batch_size=128)
