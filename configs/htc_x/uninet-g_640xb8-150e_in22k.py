# ImageNet-22K pre-training of the backbone (appendix A.5.2): 150 epochs with
# AdamW, cosine from 5e-3 to 1e-4, batch 5120, weight decay 0.03, stochastic
# depth 0.3. For mmpretrain, which this project neither needs nor installs.
# Image size, augmentation and warm-up: own.
_base_ = ['mmpretrain::_base_/default_runtime.py']
custom_imports = dict(
    imports=['mmagvm', 'mmagvm.models'], allow_failed_imports=False
)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='UniNet',
        arch='G',
        out_indices=(5,),
        drop_path_rate=0.3,
        norm_cfg=dict(type='SyncBN'),
        with_cp=True,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=21841,
        in_channels=1152,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
data_preprocessor = dict(
    num_classes=21841,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
)
train_dataloader = dict(
    batch_size=8,
    num_workers=5,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='ImageNet21k',
        data_root='data/imagenet22k',
        split='train',
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomResizedCrop', scale=224),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
    ),
)
train_cfg = dict(by_epoch=True, max_epochs=150)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-3, weight_decay=0.03),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=1e-3,
        by_epoch=True,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR', eta_min=1e-4, by_epoch=True, begin=5, end=150
    ),
]
auto_scale_lr = dict(base_batch_size=5120)
