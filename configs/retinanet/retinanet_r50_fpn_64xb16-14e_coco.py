# batch 1024: mmdet's base rate, grown by the paper's rule; an epoch is 115
# iterations
_base_ = './_base_/retinanet_r50_fpn_14e_coco.py'
optim_wrapper = dict(optimizer=dict(lr=0.226))
param_scheduler = [dict(_base_.warmup, end=230), _base_.decay]
auto_scale_lr = dict(base_batch_size=1024)
