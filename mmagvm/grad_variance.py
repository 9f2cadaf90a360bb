"""Measures the halves of the batch that the variance is computed from.

Two sources of halves, one contract (:class:`HalfBatches`): the ranks of a
data-parallel run, and the accumulated micro-batches of a single one.
The only user of torch.distributed in this package.
"""

from abc import ABC, abstractmethod
from typing import Any, Dict, List, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .functional import adam_divisor, half_batch_norms


class HalfBatches(ABC):
    """Where D = G1 - G2 of one update comes from.

    ``start`` before the last backward passes of an update that is measured,
    ``signed`` once its gradients are ready. In between and on every other
    update nothing is computed, copied or sent.
    """

    #: Ranks whose gradients are averaged.
    world_size: int = 1

    def __init__(self) -> None:
        self.measuring = False

    def start(self) -> None:
        """Collect during this update."""
        self.measuring = True

    def after_backward(self, micro_batch: int) -> None:
        """Called after the backward of each accumulated micro-batch.

        Args:
            micro_batch: How many of this update's are done, from 1.
        """

    @abstractmethod
    def signed(self) -> Dict[Tensor, Tensor]:
        """D of every parameter that has it, and the end of collecting.

        In the scale of ``param.grad``, which holds the same update's S.
        """


class RankHalves(HalfBatches):
    """Even ranks against odd ranks, by DDP's communication hook.

    A measured update sends each gradient bucket a second time, with the sign
    of the rank's half, overlapped with the backward pass like the first.
    The first is computed as DDP does without any hook, so training is bit for
    bit the same whether or not an update is measured.

    Args:
        model: The data-parallel model; its one place for a communication hook
            is taken.

    Raises:
        ValueError: The place is already taken.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        super().__init__()
        self.group = model.process_group
        self.world_size = dist.get_world_size(self.group)
        self.sign = 1 - 2 * (dist.get_rank(self.group) % 2)
        self._pending: List[Tuple[Any, List[Tensor], List[Tensor]]] = []
        try:
            model.register_comm_hook(self, _all_reduce_bucket)
        except RuntimeError as error:
            raise ValueError(
                'AGVM measures in the communication hook of '
                'DistributedDataParallel, which has place for one, and this '
                'model has one already (fp16 or bf16 compression, PowerSGD?): '
                f'remove its register_comm_hook call ({error})'
            ) from error

    def start(self) -> None:
        super().start()
        self._pending.clear()

    def all_reduce(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        """Average a bucket over the ranks; if measuring, sum it with signs."""
        # DDP multiplies by the reciprocal too: dividing would round otherwise
        buffer = bucket.buffer().mul_(1 / self.world_size)
        signed = buffer * self.sign if self.measuring else None
        work = dist.all_reduce(buffer, group=self.group, async_op=True)
        if signed is not None:
            views = [
                signed.as_strided(
                    grad.size(),
                    grad.stride(),
                    grad.storage_offset() - buffer.storage_offset(),
                )
                for grad in bucket.gradients()
            ]
            self._pending.append(
                (
                    dist.all_reduce(signed, group=self.group, async_op=True),
                    bucket.parameters(),
                    views,
                )
            )
        future: torch.futures.Future[Tensor] = work.get_future().then(
            lambda done: done.value()[0]
        )
        return future

    def signed(self) -> Dict[Tensor, Tensor]:
        signed: Dict[Tensor, Tensor] = {}
        for work, params, views in self._pending:
            work.wait()
            signed.update(zip(params, views))
        self._pending.clear()
        self.measuring = False
        return signed


def _all_reduce_bucket(
    halves: RankHalves,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    # DDP asks for a function whose second parameter has this name
    return halves.all_reduce(bucket)


class MicroBatchHalves(HalfBatches):
    """The first half of one rank's micro-batches against the rest.

    Of K accumulated micro-batches the first floor(K / 2) are one half: a copy
    of the accumulated gradient is taken after them.

    Args:
        params: All trainable parameters.
        accumulative_counts: K, 2 or more.
    """

    def __init__(
        self, params: Sequence[Tensor], accumulative_counts: int
    ) -> None:
        super().__init__()
        self.params = params
        self.first_half = accumulative_counts // 2
        self._snapshot: Dict[Tensor, Tensor] = {}

    def start(self) -> None:
        super().start()
        self._snapshot = {}

    def after_backward(self, micro_batch: int) -> None:
        if self.measuring and micro_batch == self.first_half:
            self._snapshot = {
                param: param.grad.clone()
                for param in self.params
                if param.grad is not None
            }

    def signed(self) -> Dict[Tensor, Tensor]:
        # D = G1 - G2 = 2 * G1 - S; a gradient that only came later is all G2
        snapshot, self._snapshot = self._snapshot, {}
        self.measuring = False
        if not snapshot:
            return {}
        grads = {p: p.grad for p in self.params if p.grad is not None}
        totals = list(grads.values())
        firsts = [
            snapshot[param] if param in snapshot else torch.zeros_like(total)
            for param, total in grads.items()
        ]
        torch._foreach_mul_(firsts, 2)
        torch._foreach_sub_(firsts, totals)
        return dict(zip(grads, firsts))


def build_halves(
    model: nn.Module, params: Sequence[Tensor], accumulative_counts: int
) -> HalfBatches:
    """The source of halves that fits how ``model`` is trained.

    Args:
        model: As training calls it, in its data-parallel wrapper if any.
        params: All trainable parameters.
        accumulative_counts: Micro-batches in an update.

    Raises:
        ValueError: AGVM cannot measure in this setting; says what can.
    """
    wrappers = {cls.__name__ for cls in type(model).__mro__}
    for name in (
        'DeepSpeedEngine',
        'MMDeepSpeedEngineWrapper',
        'FullyShardedDataParallel',
    ):
        if name in wrappers:
            raise ValueError(
                f'AGVM does not support {name}, which keeps gradients and '
                'optimizer in shards of its own: train with '
                'MMDistributedDataParallel'
            )
    if any(type(param).__name__ == 'DTensor' for param in params):
        raise ValueError(
            'AGVM does not support sharded parameters (fully_shard): train '
            'with MMDistributedDataParallel'
        )
    if isinstance(model, DistributedDataParallel):
        if dist.get_world_size(model.process_group) > 1:
            return RankHalves(model)
    elif dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f'AGVM measures in the gradient reduction of DistributedData'
            f'Parallel, but with {dist.get_world_size()} ranks the model is '
            f'a {type(model).__name__}: train with MMDistributedDataParallel'
        )
    if accumulative_counts < 2:
        raise ValueError(
            'AGVM compares two halves of the batch, and one rank with '
            f'accumulative_counts={accumulative_counts} has only one part: '
            'train on 2 or more ranks, or set accumulative_counts=2 or more '
            'in optim_wrapper'
        )
    return MicroBatchHalves(params, accumulative_counts)


def module_norms(
    param_groups: Sequence[Dict[str, Any]],
    state: Dict[Tensor, Any],
    modules: Sequence[int],
    signed: Dict[Tensor, Tensor],
) -> Tensor:
    """The norms of every module's halves, in one device-to-host transfer.

    Summed over parameters in the order of the groups, never of DDP's buckets,
    so that a resumed run, whose first buckets differ, rounds the same.

    Args:
        param_groups: The optimizer's.
        state: The optimizer's; a group of an optimizer that keeps
            ``exp_avg_sq`` is measured on Alg. 2's modified gradients.
        modules: Index of each group's module, 0 to h - 1.
        signed: From :meth:`HalfBatches.signed`.

    Returns:
        (h, 4) on the CPU: a row of
        :func:`~mmagvm.functional.half_batch_norms` for each module.
    """
    device = param_groups[0]['params'][0].device
    norms = torch.zeros(
        max(modules) + 1, 4, dtype=torch.float64, device=device
    )
    for group, module in zip(param_groups, modules):
        params = [
            p for p in group['params'] if p in signed and p.grad is not None
        ]
        if not params:
            continue
        totals: List[Tensor] = [p.grad for p in params]
        signs = [signed[p] for p in params]
        if has_second_moment(group, state):
            divisor = adam_divisor(
                totals,
                [_exp_avg_sq(state, p) for p in params],
                float(group['betas'][1]),
                float(group['eps']),
            )
            totals = list(torch._foreach_div(totals, divisor))
            signs = list(torch._foreach_div(signs, divisor))
        norms[module] += half_batch_norms(totals, signs)
    return norms.cpu()


def has_second_moment(group: Dict[str, Any], state: Dict[Tensor, Any]) -> bool:
    """Whether the optimizer keeps Adam's second moment for a group.

    Told from its state; before the first update, when there is none, from
    whether it has Adam's coefficients.
    """
    if not {'betas', 'eps'} <= set(group):
        return False
    if not any(state.values()):
        return True
    return any('exp_avg_sq' in values for values in state.values())


def _exp_avg_sq(state: Dict[Tensor, Any], param: Tensor) -> Tensor:
    values = state.get(param)  # get: optimizer.state makes entries on demand
    if not values or 'exp_avg_sq' not in values:
        return torch.zeros_like(param)
    exp_avg_sq: Tensor = values['exp_avg_sq']
    return exp_avg_sq
