# batch 4096 with AGVM; the ratio is held in the range of appendix A.6
_base_ = './retinanet_r18_fpn_256xb16-14e_coco.py'
optim_wrapper = dict(
    _base_.agvm,
    interval=5,
    begin=87,
    eps=1e-6,
    ratio_range=(0.1, 10.0),
)
custom_hooks = _base_.agvm_hooks
default_hooks = dict(logger=dict(interval=5))
