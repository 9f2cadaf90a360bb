# batch 512, measured from the start but not modulated
_base_ = '../faster_rcnn/faster-rcnn_r50_fpn_32xb16-agvm-16e_coco.py'
optim_wrapper = dict(modulate=False, begin=0)
