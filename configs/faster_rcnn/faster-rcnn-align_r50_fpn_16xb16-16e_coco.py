# batch 256 as in the official code; an epoch is 459 iterations
_base_ = './_base_/faster-rcnn-align_r50_fpn_16e_coco.py'
optim_wrapper = dict(optimizer=dict(lr=0.226), clip_grad=dict(max_norm=1.0))
param_scheduler = [dict(_base_.align_warmup, end=918), _base_.decay]
custom_hooks = [dict(type='ClipGradWindowHook', begin=818, end=1018)]
auto_scale_lr = dict(base_batch_size=256)
