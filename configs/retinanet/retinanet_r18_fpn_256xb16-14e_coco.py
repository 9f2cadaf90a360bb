# batch 4096: not in the paper; an epoch is 29 iterations
_base_ = './_base_/retinanet_r18_fpn_14e_coco.py'
optim_wrapper = dict(optimizer=dict(lr=0.453))
param_scheduler = [dict(_base_.warmup, end=58), _base_.decay]
auto_scale_lr = dict(base_batch_size=4096)
