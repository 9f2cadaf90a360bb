# batch 512 as in the official code; an epoch is 230 iterations
_base_ = './_base_/mask-rcnn-align_r50_fpn_16e_coco.py'
optim_wrapper = dict(optimizer=dict(lr=0.32), clip_grad=dict(max_norm=1.0))
param_scheduler = [dict(_base_.align_warmup, end=460), _base_.decay]
custom_hooks = [dict(type='ClipGradWindowHook', begin=360, end=560)]
auto_scale_lr = dict(base_batch_size=512)
