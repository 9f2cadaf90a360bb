# batch 2048: appendix A.5, table 2
_base_ = './_base_/fpn_r50_ade20k-512x512.py'
optim_wrapper = dict(optimizer=dict(lr=0.226))
param_scheduler = [
    dict(_base_.warmup, end=125),
    dict(_base_.decay, end=2500),
]
train_cfg = dict(max_iters=2500, val_interval=250)
default_hooks = dict(checkpoint=dict(interval=250))
auto_scale_lr = dict(base_batch_size=2048)
