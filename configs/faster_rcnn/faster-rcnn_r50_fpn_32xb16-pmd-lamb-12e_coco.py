# batch 512 with PMD-LAMB: period and factor are not from a paper
_base_ = './faster-rcnn_r50_fpn_32xb16-lamb-12e_coco.py'
optim_wrapper = dict(
    optimizer=dict(type='PMDLAMB', period=100, moment_decay=0.5)
)
