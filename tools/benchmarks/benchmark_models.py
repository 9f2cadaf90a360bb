"""mmdet's real models with random weights, and images made for them."""

from typing import Any, Dict, Tuple

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData

DETECTOR = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'


def build_model(config: str, **changes: Any) -> Tuple[BaseModel, Config]:
    """A model as its config has it, without pretrained weights.

    Args:
        config: Such as ``mmdet::faster_rcnn/...``.
        changes: Merged into ``cfg.model``.
    """
    init_default_scope('mmdet')
    # otherwise it reports every weight
    MMLogger.get_current_instance().setLevel('WARNING')
    cfg = get_config(config)
    cfg.merge_from_dict(dict(model=changes))
    _drop_pretrained(cfg.model)
    return MODELS.build(cfg.model), cfg


def _drop_pretrained(cfg: Any) -> None:
    """Remove every initialisation that would download a checkpoint."""
    if isinstance(cfg, dict):
        init_cfg = cfg.get('init_cfg')
        if isinstance(init_cfg, dict) and init_cfg['type'] == 'Pretrained':
            cfg.pop('init_cfg')
        for value in cfg.values():
            _drop_pretrained(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            _drop_pretrained(value)


def build_detector(proposals: int) -> BaseModel:
    """Faster R-CNN R50-FPN with ``proposals`` boxes for each head.

    The config has 1000 and 512; fewer suit small images. The parameters stay
    the same.
    """
    torch.manual_seed(0)
    model, _ = build_model(
        DETECTOR,
        train_cfg=dict(
            rpn_proposal=dict(max_per_img=proposals),
            rcnn=dict(sampler=dict(num=proposals)),
        ),
    )
    # frozen statistics of BN do not normalise the activations: scaled weights
    # keep them finite through all blocks
    model.init_weights()
    return model.train()


def make_data(image_size: int, seed: int) -> Dict[str, Any]:
    """One image of noise with three boxes, as a data loader gives it."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(
        0, 256, (3, image_size, image_size), generator=generator
    ).to(torch.uint8)
    corners = torch.rand(3, 2, generator=generator) * image_size / 2
    sizes = (0.2 + 0.3 * torch.rand(3, 2, generator=generator)) * image_size
    sample = DetDataSample(
        metainfo=dict(
            img_shape=(image_size, image_size),
            ori_shape=(image_size, image_size),
            scale_factor=(1.0, 1.0),
        )
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.cat([corners, corners + sizes], dim=1),
        labels=torch.randint(0, 80, (3,), generator=generator),
    )
    return dict(inputs=[image], data_samples=[sample])
