# With the last mask head of HTC-Lite; the paper reports boxes only.
_base_ = './htc-x_uninet-g_480xb2-agvm-adamw-11e_coco.py'
model = dict(
    roi_head=dict(
        mask_roi_extractor=dict(
            type='SingleRoIExtractor',
            roi_layer=dict(type='RoIAlign', output_size=14, sampling_ratio=0),
            out_channels=384,
            featmap_strides=[8, 16, 32, 64],
            finest_scale=112,
        ),
        mask_head=dict(
            type='FCNMaskHead',
            num_convs=4,
            in_channels=384,
            conv_out_channels=256,
            num_classes=80,
            loss_mask=dict(
                type='CrossEntropyLoss', use_mask=True, loss_weight=1.0
            ),
        ),
    ),
    train_cfg=dict(
        rcnn=[
            dict(stage, mask_size=28) for stage in _base_.model.train_cfg.rcnn
        ]
    ),
    test_cfg=dict(rcnn=dict(mask_thr_binary=0.5)),
)
# masks, which the base's pipeline leaves out
train_pipeline = [
    dict(step, with_mask=True) if step['type'] == 'LoadAnnotations' else step
    for step in _base_.train_pipeline
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(metric=['bbox', 'segm'])
test_evaluator = val_evaluator
