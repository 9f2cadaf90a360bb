"""All checks, in order: those that others depend on come first."""

from functools import partial
from pathlib import Path
from typing import List, Tuple

import torch

from mmagvm.checks import collectives, environment, norm_layers
from mmagvm.checks.cost import time_of_updates
from mmagvm.checks.measurement import (
    NAMES,
    check_variance,
    same_multipliers,
)
from mmagvm.checks.resume import resumed_run
from mmagvm.checks.running import Check


def checklist(work_dir: Path) -> List[Tuple[str, Check]]:
    """Checks by name.

    Args:
        work_dir: Where those that train write; shared by all nodes.
    """
    variance: List[Tuple[str, Check]] = [
        (
            f'phi of {estimator}, {NAMES[dtype]}',
            partial(check_variance, estimator, dtype),
        )
        for estimator in ('split', 'pairs')
        for dtype in (None, torch.bfloat16, torch.float16)
    ]
    sharded: List[Tuple[str, Check]] = [
        (
            f'phi of {estimator}, in shards',
            partial(check_variance, estimator, None, sharded=True),
        )
        for estimator in ('split', 'pairs')
    ]
    return [
        ('versions', environment.same_versions),
        ('MMCV operators', environment.mmcv_ops),
        ('all-reduce within a node', collectives.within_node),
        ('all-reduce between nodes', collectives.between_nodes),
        *variance,
        *sharded,
        ('same on all ranks', same_multipliers),
        ('CGBN', norm_layers.cross_gpu_batch_norm),
        ('SyncBN', norm_layers.sync_batch_norm),
        ('resuming', partial(resumed_run, work_dir=work_dir)),
        ('time of updates', time_of_updates),
    ]
