"""Estimator ``pairs``: all pairs of samples, from norms alone.

A sample is a rank's gradient, or a micro-batch's. Of W samples g_r it needs
r2 = mean |g_r|^2, known before they are averaged, and g2 = |mean g_r|^2,
known afterwards. Ranks exchange nothing but r2 of every module, and with it
the g2 of one rank, so that it is rounded the same on all.
"""

from abc import abstractmethod
from typing import Any, Dict, Iterator, List, Optional

import torch
import torch.distributed as dist
from torch import Tensor

from mmagvm.core.functional import pairs_noise, pairs_variance, sum_type

from .base import GradVariance, Measurement, slices_with_grad
from .micro_batches import MicroBatchVariance
from .ranks import RankVariance, read_here


class Pairs(GradVariance):
    """phi, and the noise scale, from r2 and g2.

    Gradients are preconditioned by the state before this update, since this
    update's is not known before the average. Nothing is measured while there
    is no state.
    """

    @property
    def can_measure(self) -> bool:
        return self.preconditioner.past_known

    @abstractmethod
    def local_squares(self) -> Tensor:
        """(h,) this rank's share of r2 of every module."""

    def shared(self, squares: Tensor) -> Tensor:
        """r2 and g2 of every module, the same bits on every rank.

        Args:
            squares: (h, 2), this rank's share of r2, and g2.
        """
        return squares

    def measure(self, clip: Optional[Tensor] = None) -> Measurement:
        # clipping cancels in phi: no gradient of this update is in the divisor
        self.measuring = False
        squares = self.shared(
            torch.stack(
                [self.local_squares(), self.sum_by_module(self._mean_squares)],
                1,
            )
        )
        squares, lost = self.to_cpu(squares)
        local, mean = squares.unbind(1)
        signal, noise = pairs_noise(local, mean, self.samples)
        return Measurement(
            pairs_variance(local, mean, self.samples),
            bool(squares.isfinite().all()),
            signal,
            noise,
            mean,
            lost,
        )

    def _mean_squares(self, group: Dict[str, Any]) -> Iterator[Tensor]:
        for params, grads in slices_with_grad(group):
            yield self.squares(group, params, grads).sum()


class PairsRanks(Pairs, RankVariance):
    """Every rank against every other: 2 h numbers to send."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._squares: Dict[Tensor, Tensor] = {}

    def before_last_backward(self) -> None:
        self._squares = {}
        super().before_last_backward()

    def see(self, param: Tensor, grad: Tensor, group: Dict[str, Any]) -> None:
        super().see(param, grad, group)
        self._squares[param] = self.squares(group, [param], [grad])[0]

    def local_squares(self) -> Tensor:
        self._remove_hooks()
        squares, self._squares = self._squares, {}
        read_here(squares.values())

        def square_of(group: Dict[str, Any]) -> List[Tensor]:
            parts = [squares[p] for p in group['params'] if p in squares]
            if parts:
                return [torch.stack(parts).sum()]
            # not used on this rank, but maybe on others
            first: Tensor = group['params'][0]
            return [first.new_zeros((), dtype=sum_type(first.device))]

        return self.sum_by_module(square_of) / self.world_size

    def shared(self, squares: Tensor) -> Tensor:
        if dist.get_rank(self.group) != 0:
            squares[:, 1] = 0  # all ranks take g2 of the first one
        dist.all_reduce(squares, group=self.group)
        return squares


class PairsMicroBatches(Pairs, MicroBatchVariance):
    """Every micro-batch of one rank against every other.

    A micro-batch's gradient is what it adds to the accumulated one. A copy of
    the latter is kept for the difference.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._local: List[Tensor] = []

    def start(self, loss_scale: Optional[Tensor] = None) -> None:
        super().start(loss_scale)
        self._local = []

    def see_micro_batch(self, micro_batch: int) -> None:
        self._local.append(self.sum_by_module(self._new_squares))
        self.forget_gradients()  # before new copies are made
        if micro_batch < self.samples:
            self.keep_gradients()

    def _new_squares(self, group: Dict[str, Any]) -> Iterator[Tensor]:
        for params, grads in slices_with_grad(group):
            new = list(torch._foreach_sub(grads, self.kept(params)))
            yield self.squares(group, params, new).sum()

    def local_squares(self) -> Tensor:
        # the loss of each was divided by K, so its gradient was too
        return torch.stack(self._local).sum(0) * self.samples
