# batch 32: mmdet's base rate, grown by the paper's rule; an epoch is 3665
# iterations
_base_ = './_base_/retinanet_r50_fpn_14e_coco.py'
optim_wrapper = dict(optimizer=dict(lr=0.02))
param_scheduler = [dict(_base_.warmup, end=3665), _base_.decay]
auto_scale_lr = dict(base_batch_size=32)
