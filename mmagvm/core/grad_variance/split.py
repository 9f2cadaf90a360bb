"""Estimator ``split``, the paper's: one half of the batch against the other.

The halves' gradients are G1 and G2. Training computes their sum S anyway, in
``param.grad``. Each class here adds D = G1 - G2 for one source of gradients.
"""

from abc import abstractmethod
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from mmagvm.core.functional import half_batch_norms, split_variance

from .base import GradVariance, Measurement, slices, slices_with_grad
from .micro_batches import MicroBatchVariance
from .ranks import RankVariance


class Split(GradVariance):
    """phi = 1 - cos(G1, G2), from S and D."""

    @property
    def can_measure(self) -> bool:
        return self.preconditioner.present_known

    def shared(self, norms: Tensor) -> Tensor:
        """Norms of all modules, (h, 4), the same bits on every rank."""
        return norms

    @abstractmethod
    def signed(self) -> Dict[Tensor, Tensor]:
        """D of every parameter that has it, in the scale of its ``grad``."""

    def measure(self, clip: Optional[Tensor] = None) -> Measurement:
        self.measuring = False
        signed = self.signed()

        def norms_of(group: Dict[str, Any]) -> Iterator[Tensor]:
            for params, totals in slices_with_grad(group):
                signs = [signed[p] for p in params]
                totals, signs = (
                    self.unscaled(part, clip) for part in (totals, signs)
                )
                totals, signs = self.preconditioner.by_present(
                    group, params, totals, signs
                )
                yield half_batch_norms(totals, signs)

        norms, lost = self.to_cpu(self.shared(self.sum_by_module(norms_of)))
        return Measurement(
            split_variance(norms), bool(norms.isfinite().all()), lost=lost
        )


class SplitRanks(Split, RankVariance):
    """Even ranks against odd ranks.

    A measured update sends every gradient a second time, with the sign of the
    rank's half, after the backward pass. (To send it during that pass would
    take a communication hook that keeps DistributedDataParallel's order of
    messages. This costs every other update a pass over the gradients.)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sign = 1 - 2 * (dist.get_rank(self.group) % 2)
        self.factor = sign / self.world_size  # param.grad is a mean
        self._chunks: List[Tensor] = []
        self._views: Dict[Tensor, Tensor] = {}

    def before_last_backward(self) -> None:
        # zeros, as other ranks may use a parameter that this one does not.
        # The memory is this stream's, and hooks on other streams only fill
        # it: in backward they wait for the zeros, and this stream waits for
        # them before all is sent
        self._chunks, self._views = _chunks_like(
            [
                param
                for group in self.measured_groups()
                for param in group['params']
                if param.requires_grad
            ]
        )
        super().before_last_backward()

    def drop(self) -> None:
        super().drop()
        self._chunks, self._views = [], {}

    def see(self, param: Tensor, grad: Tensor, group: Dict[str, Any]) -> None:
        super().see(param, grad, group)
        torch.mul(grad, self.factor, out=self._views[param])

    def signed(self) -> Dict[Tensor, Tensor]:
        self._remove_hooks()
        works = [
            dist.all_reduce(chunk, group=self.group, async_op=True)
            for chunk in self._chunks
        ]
        for work in works:
            work.wait()
        views = self._views
        self._chunks, self._views = [], {}
        return views

    def shared(self, norms: Tensor) -> Tensor:
        first = dist.get_process_group_ranks(self.group)[0]
        dist.broadcast(norms, src=first, group=self.group)
        return norms


def _chunks_like(
    params: Sequence[Tensor],
) -> Tuple[List[Tensor], Dict[Tensor, Tensor]]:
    """Zeros for each parameter, in few flat tensors.

    Returns:
        The flat tensors, and for each parameter its part of one, in its shape.
    """
    chunks, views = [], {}
    for cut in slices(params):
        sizes = [param.numel() for param in cut]
        chunk = cut[0].new_zeros(sum(sizes))
        chunks.append(chunk)
        for param, part in zip(cut, chunk.split(sizes)):
            views[param] = part.view(param.shape)
    return chunks, views


class SplitMicroBatches(Split, MicroBatchVariance):
    """The first half of one rank's micro-batches against the rest.

    Of K accumulated micro-batches the first floor(K / 2) are one half: a copy
    of the accumulated gradient is taken after them.
    """

    def see_micro_batch(self, micro_batch: int) -> None:
        if micro_batch == self.micro_batches // 2:
            self.keep_gradients()

    def signed(self) -> Dict[Tensor, Tensor]:
        # D = G1 - G2 = 2 * G1 - S; a gradient that only came later is all G2
        grads = self.grads()
        firsts = self.kept(list(grads))
        self.forget_gradients()
        torch._foreach_mul_(firsts, 2)
        torch._foreach_sub_(firsts, list(grads.values()))
        return dict(zip(grads, firsts))
