# batch 512: appendix A.5, table 2
_base_ = './_base_/fpn_r50_ade20k-512x512.py'
optim_wrapper = dict(optimizer=dict(lr=0.113))
param_scheduler = [
    dict(_base_.warmup, end=500),
    dict(_base_.decay, end=10000),
]
train_cfg = dict(max_iters=10000, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=1000))
auto_scale_lr = dict(base_batch_size=512)
