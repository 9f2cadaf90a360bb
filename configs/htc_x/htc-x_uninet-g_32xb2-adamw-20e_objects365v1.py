# Objects365 V1, boxes only, before COCO: AdamW at 8e-5, batch 64, 20 epochs
# of 9969 updates (appendix A.5.2). load_from is a UniNet-G of ImageNet-22K.
_base_ = './_base_/htc-x_uninet-g.py'
load_from = 'work_dirs/uninet-g_in22k.pth'
data_root = 'data/Objects365/Obj365_v1/'
dataset_type = 'Objects365V1Dataset'
classes = dict(num_classes=365)
model = dict(
    roi_head=dict(
        bbox_head=[
            dict(head, **classes) for head in _base_.model.roi_head.bbox_head
        ],
        glbctx_head=classes,
    )
)
train_dataloader = dict(
    batch_size=2,
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='annotations/objects365_train.json',
        data_prefix=dict(img='train/'),
    ),
)
val_dataloader = dict(
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='annotations/objects365_val.json',
        data_prefix=dict(img='val/'),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(
    ann_file=data_root + 'annotations/objects365_val.json',
    sort_categories=True,
)
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=20, val_interval=20)
optim_wrapper = dict(optimizer=dict(lr=8e-5))
# own: the shape is in no source; warm-up of an epoch, a tenth at 16 and 19
param_scheduler = [
    dict(
        type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=9969
    ),
    dict(
        type='MultiStepLR',
        begin=0,
        end=20,
        by_epoch=True,
        milestones=[16, 19],
        gamma=0.1,
    ),
]
auto_scale_lr = dict(base_batch_size=64)
