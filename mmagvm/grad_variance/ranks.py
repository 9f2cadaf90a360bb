"""Sees the local gradients of ranks, in DDP's communication hook."""

from abc import abstractmethod
from typing import Callable, Dict, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from .base import GradVariance

Future = torch.futures.Future[Tensor]


def all_reduce_mean(
    group: dist.ProcessGroup,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future:
    """Average a bucket over the ranks, bit for bit as DDP does by itself."""
    # DDP multiplies by the reciprocal too: dividing would round otherwise
    buffer = bucket.buffer().mul_(1 / group.size())
    work = dist.all_reduce(buffer, group=group, async_op=True)
    future: Future = work.get_future().then(lambda done: done.value()[0])
    return future


#: By the setting ``comm_hook``: how gradients are averaged.
REDUCTIONS: Dict[Optional[str], Callable[..., Future]] = {
    None: all_reduce_mean,
    'fp16': default_hooks.fp16_compress_hook,
    'bf16': default_hooks.bf16_compress_hook,
}


class RankVariance(GradVariance):
    """Measures over ranks: each rank's gradient is one sample.

    The mean is computed as it would be without AGVM, so training is bit for
    bit the same whether or not an update is measured.

    Args:
        optimizer: As in the base class.
        modules: As in the base class.
        model: The data-parallel model; its one place for a communication hook
            is taken.
        comm_hook: Type in which gradients are sent, 'fp16' or 'bf16'; None
            for their own.

    Raises:
        ValueError: The place is already taken.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        modules: Sequence[int],
        model: DistributedDataParallel,
        comm_hook: Optional[str] = None,
    ) -> None:
        super().__init__(optimizer, modules)
        self.group = model.process_group
        self.world_size = dist.get_world_size(self.group)
        self.reduction = REDUCTIONS[comm_hook]
        self.sent_dtype = dict(fp16=torch.float16, bf16=torch.bfloat16).get(
            comm_hook or ''
        )
        try:
            model.register_comm_hook(self, _reduce)
        except RuntimeError as error:
            raise ValueError(
                'AGVM measures in the communication hook of '
                'DistributedDataParallel, which has place for one, and this '
                'model has one already: remove its register_comm_hook call; '
                "for fp16 or bf16 compression set comm_hook='fp16' or 'bf16' "
                'in optim_wrapper instead; PowerSGD cannot be combined with '
                f'AGVM ({error})'
            ) from error

    def reduce(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> Future:
        """Average a bucket over the ranks, looking at it if measuring."""
        send = self.observe(bucket) if self.measuring else None
        future = self.reduction(self.group, bucket)
        if send is not None:
            send()
        return future

    @abstractmethod
    def observe(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> Optional[Callable[[], None]]:
        """See a bucket of local gradients, before it is averaged in place.

        Returns:
            What remains to be sent, to be called once the average is on its
            way; None if nothing.
        """


def _reduce(
    variance: RankVariance,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> Future:
    # DDP asks for a function whose second parameter has this name
    return variance.reduce(bucket)
