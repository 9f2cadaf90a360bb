# batch 32: appendix A.5, table 3; an epoch is 3665 iterations
_base_ = './_base_/faster-rcnn_swin-t_fpn_adamw-12e_coco.py'
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [dict(_base_.warmup, end=3665), _base_.decay]
auto_scale_lr = dict(base_batch_size=32)
