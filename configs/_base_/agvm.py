# AGVM with the paper's settings. A base may not define optim_wrapper twice, so
# it comes as `agvm`; inherit it next to any mmdet or mmseg config and write
#     optim_wrapper = dict(**_base_.agvm, optimizer=dict(lr=...), begin=...)
custom_imports = dict(imports=['mmagvm'], allow_failed_imports=False)
custom_hooks = [dict(type='AGVMHook')]
agvm = dict(
    type='AGVMOptimWrapper',
    constructor='AGVMOptimWrapperConstructor',
    estimator='split',
    interval=10,
    ema_decay=0.97,
)
