# Faster R-CNN with AdamW, of any batch size.
_base_ = './faster-rcnn_r50_fpn_16e_coco.py'
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True, type='AdamW', betas=(0.9, 0.999), weight_decay=0.05
    )
)
# not in the paper: those of mmdet's 1x schedule
decay = dict(end=12, milestones=[8, 11])
train_cfg = dict(max_epochs=12)
