# like its base, but without FPN
_base_ = [
    './retinanet_r50_fpn_32xb16-measure-14e_coco.py',
    './_base_/retinanet_without-fpn.py',
]
model = _base_.without_fpn
