# batch 1024 with AGVM and SOAP: this project's own
_base_ = './retinanet_r50_fpn_64xb16-soap-14e_coco.py'
optim_wrapper = dict(_base_.agvm, interval=5, begin=330)
custom_hooks = _base_.agvm_hooks
default_hooks = dict(logger=dict(interval=5))
