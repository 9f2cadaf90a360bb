# What recipes of several folders use by name.
_base_ = './mmagvm.py'
# the shape of warm-up is not in the paper: mmdet's; each config sets the end
warmup = dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0)
# the backbone's norm layers in the official code (Runner reads `sync_bn`)
synchronized = dict(
    norm_cfg=dict(type='SyncBN', requires_grad=True), norm_eval=False
)
# images per GPU in the official code
train_dataloader_16 = dict(batch_size=16, num_workers=8)
# for custom_hooks
agvm_hooks = [dict(type='AGVMHook')]
