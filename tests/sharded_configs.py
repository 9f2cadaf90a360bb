"""Sharded runs of the toy, as a FlexibleRunner trains them."""

from typing import Any

from mmengine.config import Config
from toy_runner import toy_cfg


def sharded_cfg(
    work_dir: Any,
    sharded: bool = True,
    strategy: Any = None,
    units: Any = (r'backbone\.\d', 'neck'),
    **settings: Any,
) -> Config:
    """The toy's config, for shards or data-parallel training."""
    cfg = toy_cfg(work_dir, **settings)
    cfg.launcher = 'pytorch'
    cfg.log_level = 'ERROR'
    cfg.runner_type = 'FlexibleRunner'
    cfg.env_cfg = dict(dist_cfg=dict(backend='gloo'))
    cfg.strategy = dict(
        type='FullyShardStrategy',
        units=units,
        **(strategy or {}),
    )
    if not sharded:
        cfg.pop('runner_type')
        cfg.pop('strategy')
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            device_ids=None,
        )
    return cfg
