# COCO fine-tuning at batch 960 without AGVM, which the paper reports as NaN.
# 123 updates an epoch, 1353 in all; load_from is a checkpoint of Objects365.
_base_ = './_base_/htc-x_uninet-g.py'
load_from = 'work_dirs/htc-x_objects365v1.pth'
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_epochs=11, val_interval=11)
# own: the appendix's 3 epochs of warm-up for AdamW at 1024, MegDet's 11 epochs
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=369
    ),
    dict(
        type='MultiStepLR',
        begin=0,
        end=11,
        by_epoch=True,
        milestones=[8, 10],
        gamma=0.1,
    ),
]
auto_scale_lr = dict(base_batch_size=960)
