"""Reads the gradients of one rank's accumulated micro-batches."""

from abc import abstractmethod
from typing import Dict, List, Optional, Sequence

import torch
from torch import Tensor

from .base import GradVariance


class MicroBatchVariance(GradVariance):
    """Measures over micro-batches: each one's gradient is a sample.

    Args:
        optimizer: As in the base class.
        modules: As in the base class.
        micro_batches: K, how many an update accumulates, 2 or more.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        modules: Sequence[int],
        micro_batches: int,
    ) -> None:
        super().__init__(optimizer, modules)
        self.micro_batches = self.samples = micro_batches
        self._kept: Dict[Tensor, Tensor] = {}

    def start(self, loss_scale: Optional[Tensor] = None) -> None:
        super().start(loss_scale)
        self.forget_gradients()

    def after_backward(self, micro_batch: int) -> None:
        if self.measuring:
            self.see_micro_batch(micro_batch)

    @abstractmethod
    def see_micro_batch(self, micro_batch: int) -> None:
        """Note the gradients that have been accumulated so far.

        Args:
            micro_batch: Number of the last one in this update, from 1.
        """

    def keep_gradients(self) -> None:
        """Copy the gradients that have been accumulated so far."""
        # called between backward passes, when this stream waits for those of
        # their hooks: copies are made, read and freed on one stream
        self._kept.update(
            (param, grad.clone()) for param, grad in self.grads().items()
        )

    def kept(self, params: Sequence[Tensor]) -> List[Tensor]:
        """The copies; zeros for a parameter that had no gradient then."""
        return [
            self._kept[param]
            if param in self._kept
            else torch.zeros_like(param)
            for param in params
        ]

    def forget_gradients(self) -> None:
        """Free the copies."""
        self._kept.clear()
