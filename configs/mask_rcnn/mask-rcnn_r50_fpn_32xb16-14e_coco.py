# batch 512: appendix A.5, table 1; an epoch is 230 iterations
_base_ = './_base_/mask-rcnn_r50_fpn_14e_coco.py'
optim_wrapper = dict(optimizer=dict(lr=0.32))
param_scheduler = [dict(_base_.warmup, end=460), _base_.decay]
auto_scale_lr = dict(base_batch_size=512)
