# batch 256: not in the paper, the rate is by its rule
_base_ = './_base_/fpn_r50_ade20k-512x512.py'
optim_wrapper = dict(optimizer=dict(lr=0.08))
param_scheduler = [
    dict(_base_.warmup, end=500),
    dict(_base_.decay, end=20000),
]
train_cfg = dict(max_iters=20000, val_interval=2000)
default_hooks = dict(checkpoint=dict(interval=2000))
auto_scale_lr = dict(base_batch_size=256)
