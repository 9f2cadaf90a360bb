# AGVM with the paper's settings. A base may not define optim_wrapper twice, so
# it comes as `agvm`; inherit it next to any mmdet or mmseg config and write
#     optim_wrapper = dict(**_base_.agvm, optimizer=dict(lr=...), begin=...)
_base_ = './mmagvm.py'
custom_hooks = [dict(type='AGVMHook')]
