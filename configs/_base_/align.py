# Where the official code's Faster R-CNN and Mask R-CNN differ from mmdet's,
# and its warm-up and clipping.
align_rpn_head = dict(
    loss_cls=dict(use_sigmoid=False),
    loss_bbox=dict(_delete_=True, type='SmoothL1Loss', beta=1 / 9),
)
align_roi_layer = dict(sampling_ratio=2)
align_bbox_head = dict(
    loss_bbox=dict(_delete_=True, type='SmoothL1Loss', beta=1.0)
)
align_train_cfg = dict(rpn_proposal=dict(max_per_img=2000))
align_test_cfg = dict(rpn=dict(max_per_img=2000), rcnn=dict(score_thr=0.0))
align_warmup = dict(
    type='ExponentialWarmupLR', start_factor=0.001, by_epoch=False, begin=0
)
# it keeps mu, the root of a ratio held in [0.5, 10], in [0.707, 3.16]
align_ratio_range = (0.5**0.5, 10**0.5)
