# batch 1024 with LARS: settings not in the paper, see the README
_base_ = './mask-rcnn_r50_fpn_64xb16-14e_coco.py'
optim_wrapper = dict(optimizer=dict(type='LARS', trust_coefficient=0.02))
