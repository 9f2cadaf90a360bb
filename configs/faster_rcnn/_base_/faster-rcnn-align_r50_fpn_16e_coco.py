# The official code's own Faster R-CNN.
_base_ = ['./faster-rcnn_r50_fpn_16e_coco.py', '../../_base_/align.py']
model = dict(
    rpn_head=_base_.align_rpn_head,
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=_base_.align_roi_layer),
        bbox_head=_base_.align_bbox_head,
    ),
    train_cfg=_base_.align_train_cfg,
    test_cfg=_base_.align_test_cfg,
)
