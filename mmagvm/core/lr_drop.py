"""A moving average that restarts when the learning rate drops.

This project's addition to the paper's rule.
"""

import logging
from typing import Any, Dict

logger = logging.getLogger('mmagvm')

#: A learning rate below this part of the highest one has dropped.
DROPPED = 0.5


class LRDrop:
    """The weight alpha of Eq. 42, which restarts at each drop.

    Gradient variances change when the learning rate drops, and multipliers
    that forget slowly are then wrong for long. From a drop on, a multiplier is
    the mean of the ratios since, until that mean moves as slowly as usual.

    Attributes:
        highest (float): Highest learning rate that was measured since the
            last drop.
        drops (int): How often the learning rate has dropped.
        since (int): Measurements since the last drop.
    """

    def __init__(self) -> None:
        self.highest = 0.0
        self.drops = 0
        self.since = 0

    def ema_decay(self, usual: float, lr: float) -> float:
        """alpha of one measurement.

        Args:
            usual: alpha without drops.
            lr: The schedule's learning rate at this measurement.
        """
        if lr < DROPPED * self.highest:
            logger.info(
                f'the learning rate has dropped from {self.highest:.4g} to '
                f'{lr:.4g}: the moving averages of lr_scale restart'
            )
            self.drops += 1
            self.since = 0
            self.highest = lr
        self.highest = max(self.highest, lr)
        if not self.drops:
            return usual
        self.since += 1
        return min(usual, 1 - 1 / self.since)

    def state_dict(self) -> Dict[str, Any]:
        """All attributes."""
        return dict(vars(self))

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load a state of :meth:`state_dict`."""
        vars(self).update(state)
