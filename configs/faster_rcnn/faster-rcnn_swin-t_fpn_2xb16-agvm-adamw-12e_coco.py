# batch 32 with AGVM
_base_ = './faster-rcnn_swin-t_fpn_2xb16-adamw-12e_coco.py'
optim_wrapper = dict(_base_.agvm, begin=3765)
custom_hooks = _base_.agvm_hooks
default_hooks = dict(logger=dict(interval=10))
