# batch 512 with SOAP: this project's own, by its study, which has no such
# model; not in the paper, not run on COCO
_base_ = './panoptic-fpn_r50_fpn_32xb16-14e_coco.py'
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type='SOAP',
        lr=8e-4,
        betas=(0.8, 0.95),
        weight_decay=0.05,
        precondition_frequency=5,
    ),
    clip_grad=dict(max_norm=1.0),
)
