# COCO fine-tuning at batch 32: 62.6 box AP in 73 hours, the paper reports.
# The rate is in no source: half of that at 64 on Objects365 (own).
_base_ = './htc-x_uninet-g_480xb2-adamw-11e_coco.py'
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=4e-5))
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000
    ),
    _base_.param_scheduler[1],
]
auto_scale_lr = dict(base_batch_size=32)
