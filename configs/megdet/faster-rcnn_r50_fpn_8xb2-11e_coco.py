# batch 16, batch norm fixed: the paper's baseline; an epoch is 7330 iterations
_base_ = './_base_/faster-rcnn_r50_fpn_11e_coco.py'
train_dataloader = dict(batch_size=2, num_workers=2)
optim_wrapper = dict(optimizer=dict(lr=0.02))
auto_scale_lr = dict(base_batch_size=16)
