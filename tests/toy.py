"""A detector-shaped toy: a few modules, a loss, and batches to train on."""

from typing import Any, Dict, Optional

import torch
from mmengine.optim import OptimWrapper
from torch import nn


class ToyDetector(nn.Module):
    """Backbone, neck and two heads, the second of which may be idle.

    ``forward`` gives the mean loss of a batch of inputs (n, 6). A batch with
    a positive first element skips the second head, whose parameters then get
    no gradient, as heads do that an image's targets do not touch.
    """

    def __init__(self, idle_head: bool = False) -> None:
        super().__init__()
        self.idle_head = idle_head
        self.backbone = nn.Sequential(
            nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh()
        )
        self.neck = nn.Linear(7, 5)
        self.rpn_head = nn.Linear(5, 3)
        self.roi_head = nn.ModuleDict(
            dict(bbox_head=nn.Linear(5, 2), mask_head=nn.Linear(5, 1))
        )
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.neck(self.backbone(inputs)) * self.scale)
        losses: torch.Tensor = self.rpn_head(x).square().sum(1)
        losses = losses + self.roi_head['bbox_head'](x).cos().sum(1)
        if not (self.idle_head and inputs[0, 0] > 0):
            losses = losses + self.roi_head['mask_head'](x).exp().sum(1)
        return losses.mean()


MODULES = (
    'backbone',
    'neck',
    'rpn_head',
    'roi_head.bbox_head',
    'roi_head.mask_head',
    'others',
)


def make_model(seed: int = 0, **kwargs: Any) -> ToyDetector:
    """The same double-precision model for the same seed."""
    torch.manual_seed(seed)
    return ToyDetector(**kwargs).double()


def make_batch(update: int, rank: int, micro_batch: int) -> torch.Tensor:
    """Inputs that only depend on where they are used, (4, 6)."""
    generator = torch.Generator().manual_seed(
        10_000 * update + 100 * rank + micro_batch
    )
    return torch.randn(4, 6, generator=generator, dtype=torch.float64)


def wrapper_cfg(
    optimizer: str = 'SGD',
    paramwise_cfg: Optional[Dict[str, Any]] = None,
    **settings: Any,
) -> Dict[str, Any]:
    """An optim_wrapper config, by default with the paper's estimator."""
    optimizers: Dict[str, Dict[str, Any]] = dict(
        SGD=dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-2),
        AdamW=dict(type='AdamW', lr=0.01, weight_decay=0.05),
    )
    return dict(
        type='AGVMOptimWrapper',
        constructor='AGVMOptimWrapperConstructor',
        optimizer=dict(optimizers[optimizer]),
        paramwise_cfg=paramwise_cfg,
        **{'estimator': 'split', **settings},
    )


def train(
    model: nn.Module,
    wrapper: OptimWrapper,
    updates: int,
    rank: int = 0,
    accumulation: int = 1,
    start: int = 0,
) -> None:
    """Run updates ``start`` to ``updates`` of ``make_batch``'s stream."""
    for update in range(start, updates):
        for micro_batch in range(accumulation):
            with wrapper.optim_context(model):
                loss = model(make_batch(update, rank, micro_batch))
            wrapper.update_params(loss)
