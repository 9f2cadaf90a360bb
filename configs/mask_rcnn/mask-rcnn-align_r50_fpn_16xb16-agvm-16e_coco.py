# batch 256 with AGVM, as in the official code
_base_ = './mask-rcnn-align_r50_fpn_16xb16-16e_coco.py'
optim_wrapper = dict(
    _base_.agvm, begin=1018, ratio_range=_base_.align_ratio_range
)
custom_hooks = [*_base_.custom_hooks, *_base_.agvm_hooks]
default_hooks = dict(logger=dict(interval=10))
