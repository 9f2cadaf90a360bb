# Semantic FPN on ADE20K, of any batch size.
_base_ = [
    'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py',
    '../../_base_/recipe.py',
]
default_scope = 'mmseg'
model = dict(backbone=_base_.synchronized)
train_dataloader = _base_.train_dataloader_16
optim_wrapper = dict(optimizer=dict(weight_decay=5e-4))
# beside warm-up, not after it: the paper's formula counts from iteration 0
decay = dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0)
