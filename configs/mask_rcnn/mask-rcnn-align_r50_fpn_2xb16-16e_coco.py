# batch 32 as in the official code; an epoch is 3665 iterations
_base_ = './_base_/mask-rcnn-align_r50_fpn_16e_coco.py'
optim_wrapper = dict(optimizer=dict(lr=0.04), clip_grad=dict(max_norm=1.0))
param_scheduler = [dict(_base_.align_warmup, end=3665), _base_.decay]
custom_hooks = [dict(type='ClipGradWindowHook', begin=3565, end=3765)]
auto_scale_lr = dict(base_batch_size=32)
