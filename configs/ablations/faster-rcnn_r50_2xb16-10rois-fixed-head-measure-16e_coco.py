# like its base, but with a fixed detection head: measured, never changed
_base_ = './faster-rcnn_r50_2xb16-10rois-measure-16e_coco.py'
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={'roi_head.bbox_head': dict(lr_mult=0.0)})
)
