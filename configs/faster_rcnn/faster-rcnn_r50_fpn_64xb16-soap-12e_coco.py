# batch 1024 with SOAP: this project's own, by its study; not in the paper, not
# run on COCO
_base_ = './faster-rcnn_r50_fpn_64xb16-adamw-12e_coco.py'
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,
        type='SOAP',
        lr=8e-4,
        betas=(0.8, 0.95),
        weight_decay=0.05,
        precondition_frequency=5,
    ),
)
