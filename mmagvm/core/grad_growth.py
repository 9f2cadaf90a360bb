"""How much more the gradient of every module has grown than the anchor's.

This project's addition to the paper's rule.
"""

from typing import Dict, Sequence

import torch
from torch import Tensor


class GradGrowth:
    """Gradient norms relative to their usual ones, and to the anchor's.

    The usual norm is the root of a moving average of squared norms. A module
    that begins to diverge has a gradient that grows and is alike in all
    samples. Its low variance alone would raise its learning rate.

    What scales all gradients alike cancels, such as the bias of Adam's second
    moment.

    Args:
        modules: Names of the modules.

    Attributes:
        average (Tensor): (h,) moving average of each module's squared norm;
            NaN until it has a gradient.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = list(modules)
        self.reset()

    def reset(self) -> None:
        """Forget all norms."""
        self.average = torch.full(
            (len(self.modules),), torch.nan, dtype=torch.float64
        )

    def follow(self, norm: Tensor, ema_decay: float, anchor: int) -> Tensor:
        """The growth of every module in one measurement.

        Args:
            norm: (h,) squared norms, in float64; 0 without gradient, which
                leaves a module's average as it is.
            ema_decay: Weight of the old average.
            anchor: Index of the module that the others follow.

        Returns:
            (h,), 1 or more: a norm over the usual one, divided by the same of
            the anchor.
        """
        average = torch.where(
            self.average.isnan(),
            norm,
            ema_decay * self.average + (1 - ema_decay) * norm,
        )
        self.average = torch.where(norm > 0, average, self.average)
        grown = (norm / self.average).sqrt()
        return (grown / grown[anchor]).nan_to_num(1.0).clamp(min=1)

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
