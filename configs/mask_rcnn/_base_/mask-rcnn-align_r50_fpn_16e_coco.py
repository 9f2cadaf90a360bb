# The official code's own Mask R-CNN, which trains longer than the paper's.
_base_ = ['./mask-rcnn_r50_fpn_14e_coco.py', '../../_base_/align.py']
model = dict(
    rpn_head=_base_.align_rpn_head,
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=_base_.align_roi_layer),
        mask_roi_extractor=dict(roi_layer=_base_.align_roi_layer),
        bbox_head=_base_.align_bbox_head,
    ),
    train_cfg=_base_.align_train_cfg,
    test_cfg=_base_.align_test_cfg,
)
decay = dict(end=16, milestones=[12, 14])
train_cfg = dict(max_epochs=16)
