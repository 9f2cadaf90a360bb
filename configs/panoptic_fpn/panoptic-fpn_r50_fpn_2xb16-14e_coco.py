# batch 32: appendix A.5, table 1; an epoch is 3665 iterations
_base_ = './_base_/panoptic-fpn_r50_fpn_14e_coco.py'
optim_wrapper = dict(optimizer=dict(lr=0.04))
param_scheduler = [dict(_base_.warmup, end=3665), _base_.decay]
auto_scale_lr = dict(base_batch_size=32)
