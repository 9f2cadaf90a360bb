# Detection on the backbone's last level. The anchors are not in the paper: all
# sizes that the FPN's levels have, on one.
without_fpn = dict(
    backbone=dict(out_indices=(3,)),
    neck=None,
    rpn_head=dict(
        in_channels=2048,
        anchor_generator=dict(scales=[1, 2, 4, 8, 16], strides=[32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=2048, featmap_strides=[32]),
        bbox_head=dict(in_channels=2048),
    ),
)
