"""Estimator ``split``, the paper's: one half of the batch against the other.

The halves' gradients are G1 and G2. Their sum S is what training computes
anyway, in ``param.grad``; D = G1 - G2 is what each source here provides.
"""

from abc import abstractmethod
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..functional import adam_divisor, half_batch_norms, split_variance
from .base import GradVariance, Measurement, exp_avg_sq, has_second_moment
from .ranks import RankVariance


class Split(GradVariance):
    """phi = 1 - cos(G1, G2), from S and D."""

    @abstractmethod
    def signed(self) -> Dict[Tensor, Tensor]:
        """D of every parameter that has it, in the scale of its ``grad``."""

    def measure(self, grad_scale: Optional[Tensor] = None) -> Measurement:
        self.measuring = False
        signed, state = self.signed(), self.optimizer.state

        def norms_of(group: Dict[str, Any]) -> Optional[Tensor]:
            params = [
                p
                for p in group['params']
                if p in signed and p.grad is not None
            ]
            if not params:
                return None
            totals = [p.grad for p in params]
            signs = [signed[p].to(p.grad.dtype) for p in params]
            if has_second_moment(group, state):
                if grad_scale is not None:  # v knows unscaled gradients
                    totals = list(torch._foreach_div(totals, grad_scale))
                    signs = list(torch._foreach_div(signs, grad_scale))
                divisor = adam_divisor(
                    totals,
                    [exp_avg_sq(state, p) for p in params],
                    float(group['betas'][1]),
                    float(group['eps']),
                )
                totals = list(torch._foreach_div(totals, divisor))
                signs = list(torch._foreach_div(signs, divisor))
            return half_batch_norms(totals, signs)

        norms = self.sum_by_module(norms_of).cpu()
        return Measurement(split_variance(norms), bool(norms.isfinite().all()))


class SplitRanks(Split, RankVariance):
    """Even ranks against odd ranks.

    A measured update sends each gradient bucket a second time, with the sign
    of the rank's half, overlapped with the backward pass like the first.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        modules: Sequence[int],
        model: DistributedDataParallel,
        comm_hook: Optional[str] = None,
    ) -> None:
        super().__init__(optimizer, modules, model, comm_hook)
        self.sign = 1 - 2 * (dist.get_rank(self.group) % 2)
        self._pending: List[Tuple[Any, List[Tensor], List[Tensor]]] = []

    def start(self) -> None:
        super().start()
        self._pending.clear()

    def observe(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> Callable[[], None]:
        buffer = bucket.buffer()
        signed = buffer * (self.sign / self.world_size)
        if self.sent_dtype is not None:
            signed = signed.to(self.sent_dtype)
        views = [
            signed.as_strided(
                grad.size(),
                grad.stride(),
                grad.storage_offset() - buffer.storage_offset(),
            )
            for grad in bucket.gradients()
        ]

        def send() -> None:
            work = dist.all_reduce(signed, group=self.group, async_op=True)
            self._pending.append((work, bucket.parameters(), views))

        return send

    def signed(self) -> Dict[Tensor, Tensor]:
        signed: Dict[Tensor, Tensor] = {}
        for work, params, views in self._pending:
            work.wait()
            signed.update(zip(params, views))
        self._pending.clear()
        return signed


class SplitMicroBatches(Split):
    """The first half of one rank's micro-batches against the rest.

    Of K accumulated micro-batches the first floor(K / 2) are one half: a copy
    of the accumulated gradient is taken after them.

    Args:
        optimizer: As in the base class.
        modules: As in the base class.
        accumulative_counts: K, 2 or more.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        modules: Sequence[int],
        accumulative_counts: int,
    ) -> None:
        super().__init__(optimizer, modules)
        self.first_half = accumulative_counts // 2
        self._snapshot: Dict[Tensor, Tensor] = {}

    def after_backward(self, micro_batch: int) -> None:
        if self.measuring and micro_batch == self.first_half:
            self._snapshot = {
                param: grad.clone() for param, grad in self.grads().items()
            }

    def signed(self) -> Dict[Tensor, Tensor]:
        # D = G1 - G2 = 2 * G1 - S; a gradient that only came later is all G2
        snapshot, self._snapshot = self._snapshot, {}
        grads = self.grads()
        totals = list(grads.values())
        firsts = [
            snapshot[param] if param in snapshot else torch.zeros_like(total)
            for param, total in grads.items()
        ]
        torch._foreach_mul_(firsts, 2)
        torch._foreach_sub_(firsts, totals)
        return dict(zip(grads, firsts))
