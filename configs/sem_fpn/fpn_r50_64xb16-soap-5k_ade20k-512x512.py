# batch 1024 with SOAP: this project's own, by its study; the rate is COCO's;
# not in the paper, not run on ADE20K
_base_ = './fpn_r50_64xb16-5k_ade20k-512x512.py'
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type='SOAP',
        lr=8e-4,
        betas=(0.8, 0.95),
        weight_decay=0.05,
        precondition_frequency=5,
    ),
    clip_grad=dict(_delete_=True, max_norm=1.0),
)
