"""How much the gradient of every module has grown.

This project's addition to the paper's rule.
"""

from typing import Dict, Sequence

import torch
from torch import Tensor


class GradGrowth:
    """Squared norms of gradients over their moving averages.

    A module that begins to diverge has a gradient that grows and is alike in
    all samples. Its low variance alone would raise its learning rate.

    Args:
        modules: Names of the modules.

    Attributes:
        average (Tensor): (h,) moving average of each module's squared norm;
            NaN until it has a gradient.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = list(modules)
        self.average = torch.full(
            (len(self.modules),), torch.nan, dtype=torch.float64
        )

    def follow(self, norm: Tensor, ema_decay: float) -> Tensor:
        """The growth of every module in one measurement.

        Args:
            norm: (h,) squared norms, in float64; 0 without gradient, which
                leaves a module's average as it is.
            ema_decay: Weight of the old average.

        Returns:
            (h,), 1 or more.
        """
        average = torch.where(
            self.average.isnan(),
            norm,
            ema_decay * self.average + (1 - ema_decay) * norm,
        )
        self.average = torch.where(norm > 0, average, self.average)
        grown = (norm / self.average).clamp(min=1)
        return torch.where(norm > 0, grown, 1.0)

    def state_dict(self) -> Dict[str, float]:
        """The averages that there are, by module."""
        return {
            module: average
            for module, average in zip(self.modules, self.average.tolist())
            if average == average
        }

    def load_state_dict(self, state: Dict[str, float]) -> None:
        """Load a state of :meth:`state_dict`; other modules are left out."""
        self.average = torch.tensor(
            [state.get(module, torch.nan) for module in self.modules],
            dtype=torch.float64,
        )
