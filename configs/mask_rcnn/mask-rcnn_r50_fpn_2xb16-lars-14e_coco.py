# batch 32 with LARS: settings not in the paper, see the README
_base_ = './mask-rcnn_r50_fpn_2xb16-14e_coco.py'
optim_wrapper = dict(optimizer=dict(type='LARS', trust_coefficient=0.02))
