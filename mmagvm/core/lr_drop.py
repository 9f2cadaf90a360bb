"""A moving average that restarts when the learning rate drops.

This project's addition to the paper's rule.
"""

import logging
from typing import Any, Dict, Sequence

import torch
from torch import Tensor

logger = logging.getLogger('mmagvm')

#: A learning rate below this part of the highest one has dropped.
DROPPED = 0.5


class LRDrop:
    """The weight alpha of Eq. 42, which restarts at each drop.

    Gradient variances change when the learning rate drops, and multipliers
    that forget slowly are then wrong for long. From a drop on, a multiplier is
    the mean of the ratios since, until the usual average takes over.

    Args:
        modules: Names of the modules.

    Attributes:
        highest (float): Highest learning rate that was measured since the
            last drop.
        drops (int): How often the learning rate has dropped.
        since (Tensor): (h,) measurements of each module since the last drop.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = list(modules)
        self.reset()

    def reset(self) -> None:
        """Forget all learning rates and drops."""
        self.highest = 0.0
        self.drops = 0
        self.since = torch.zeros(len(self.modules), dtype=torch.float64)

    def ema_decay(self, usual: float, lr: float, measured: Tensor) -> Tensor:
        """alpha of every module in one measurement.

        Args:
            usual: alpha without drops.
            lr: The schedule's learning rate at this measurement.
            measured: (h,) which modules are measured.
        """
        if lr < DROPPED * self.highest:
            logger.info(
                f'the learning rate has dropped from {self.highest:.4g} to '
                f'{lr:.4g}: the moving averages of lr_scale restart'
            )
            self.drops += 1
            self.since.zero_()
            self.highest = lr
        self.highest = max(self.highest, lr)
        if not self.drops:
            return torch.full_like(self.since, usual)
        self.since += measured
        return (1 - 1 / self.since.clamp(min=1)).clamp(max=usual)

    def state_dict(self) -> Dict[str, Any]:
        """The attributes; ``since`` by module."""
        return dict(
            highest=self.highest,
            drops=self.drops,
            since=dict(zip(self.modules, self.since.tolist())),
        )

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load a state of :meth:`state_dict`; other modules start at 0."""
        self.highest, self.drops = state['highest'], state['drops']
        self.since = torch.tensor(
            [state['since'].get(module, 0.0) for module in self.modules],
            dtype=torch.float64,
        )
