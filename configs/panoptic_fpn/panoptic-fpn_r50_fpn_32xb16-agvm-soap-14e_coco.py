# batch 512 with AGVM and SOAP: this project's own
_base_ = './panoptic-fpn_r50_fpn_32xb16-soap-14e_coco.py'
optim_wrapper = dict(_base_.agvm, begin=560)
custom_hooks = _base_.agvm_hooks
default_hooks = dict(logger=dict(interval=10))
