# batch 256: mmdet's base rate, grown by the paper's rule; an epoch is 459
# iterations
_base_ = './_base_/retinanet_r50_fpn_14e_coco.py'
optim_wrapper = dict(optimizer=dict(lr=0.113))
param_scheduler = [dict(_base_.warmup, end=918), _base_.decay]
auto_scale_lr = dict(base_batch_size=256)
