# Detection on the backbone's last level. The anchors are not in the paper:
# those that this level has with an FPN.
without_fpn = dict(
    backbone=dict(out_indices=(3,)),
    neck=None,
    bbox_head=dict(in_channels=2048, anchor_generator=dict(strides=[32])),
)
