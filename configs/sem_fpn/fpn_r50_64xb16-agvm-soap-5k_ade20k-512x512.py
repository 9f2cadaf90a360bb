# batch 1024 with AGVM and SOAP: this project's own
_base_ = './fpn_r50_64xb16-soap-5k_ade20k-512x512.py'
optim_wrapper = dict(_base_.agvm, interval=5, begin=350)
custom_hooks = _base_.agvm_hooks
default_hooks = dict(logger=dict(interval=5))
