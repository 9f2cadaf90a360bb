# mmagvm, and AGVM with the paper's settings for a config to put into its
# optim_wrapper; by itself this changes nothing.
custom_imports = dict(imports=['mmagvm'], allow_failed_imports=False)
agvm = dict(
    type='AGVMOptimWrapper',
    constructor='AGVMOptimWrapperConstructor',
    interval=10,
    ema_decay=0.97,
    estimator='split',
)
