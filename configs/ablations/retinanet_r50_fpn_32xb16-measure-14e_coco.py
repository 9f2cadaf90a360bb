# batch 512, measured from the start but not modulated
_base_ = '../retinanet/retinanet_r50_fpn_32xb16-agvm-14e_coco.py'
optim_wrapper = dict(modulate=False, begin=0)
