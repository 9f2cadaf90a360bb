# batch 1024: appendix A.5, table 2
_base_ = './_base_/fpn_r50_ade20k-512x512.py'
optim_wrapper = dict(optimizer=dict(lr=0.16))
param_scheduler = [
    dict(_base_.warmup, end=250),
    dict(_base_.decay, end=5000),
]
train_cfg = dict(max_iters=5000, val_interval=500)
default_hooks = dict(checkpoint=dict(interval=500))
auto_scale_lr = dict(base_batch_size=1024)
