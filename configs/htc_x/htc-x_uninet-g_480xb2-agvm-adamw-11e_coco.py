# COCO fine-tuning at batch 960 with AGVM: 62.2 box AP in 3.5 hours, the paper
# reports. tau, alpha and the beginning are the appendix's for AdamW at 1024.
_base_ = './htc-x_uninet-g_480xb2-adamw-11e_coco.py'
optim_wrapper = dict(_base_.agvm, interval=5, begin=469)
custom_hooks = [dict(type='AGVMHook')]
default_hooks = dict(logger=dict(interval=5))
