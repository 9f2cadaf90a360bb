# batch 512 with LAMB: settings not in the paper
_base_ = './faster-rcnn_r50_fpn_32xb16-adamw-12e_coco.py'
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='LAMB', lr=0.005, weight_decay=0.05)
)
