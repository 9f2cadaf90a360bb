# like its base, but without FPN
_base_ = [
    './faster-rcnn_r50_fpn_2xb16-measure-16e_coco.py',
    './_base_/faster-rcnn_without-fpn.py',
]
model = _base_.without_fpn
