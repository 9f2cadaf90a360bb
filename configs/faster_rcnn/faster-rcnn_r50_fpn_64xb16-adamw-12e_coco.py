# batch 1024: all but the epochs as Swin-T's, not in the paper; an epoch is 115
# iterations
_base_ = './_base_/faster-rcnn_r50_fpn_adamw-12e_coco.py'
optim_wrapper = dict(optimizer=dict(lr=1.5e-3), clip_grad=dict(max_norm=1.0))
param_scheduler = [dict(_base_.warmup, end=345), _base_.decay]
auto_scale_lr = dict(base_batch_size=1024)
