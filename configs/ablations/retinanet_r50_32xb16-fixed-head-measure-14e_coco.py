# like its base, but with a fixed head: measured, never changed
_base_ = './retinanet_r50_32xb16-measure-14e_coco.py'
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'bbox_head': dict(lr_mult=0.0)})
)
