"""Reads each rank's local gradients where parameters are sharded.

torch's ``fully_shard`` (FSDP2) cuts every parameter along its first dimension
into one shard for each rank of a group. A unit is a module with parameters
that are communicated together. When it has its gradients, it copies them into
one tensor, with a row for each rank. A reduce-scatter leaves each rank the
mean of its own row. A unit accepts another function for this, which is where
local gradients are read. torch calls the hooks of the parameters in the order
of the row, which shows the part of each.
"""

import logging
from abc import abstractmethod
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmagvm.core.functional import squared_norms, sum_type

from .base import GradVariance, slices
from .pairs import Pairs
from .parts import is_sharded, local_part
from .ranks import read_here
from .split import Split

logger = logging.getLogger('mmagvm')

#: The reduce-scatter that units call; torch has renamed it.
reduce_scatter = getattr(
    dist, 'reduce_scatter_single', dist.reduce_scatter_tensor
)


class Reduction:
    """The reduce-scatter of a unit, with an estimator that reads its input.

    Outside of measured updates it is torch's own.
    """

    def __init__(self, estimator: 'ShardVariance') -> None:
        self.estimator = estimator

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Memory for the rows to send, or for the part to receive."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> Any:
        """As torch calls it, with all rows in one flat tensor."""
        work = reduce_scatter(
            output_tensor, input_tensor, group=group, op=op, async_op=async_op
        )
        if self.estimator.measuring:
            self.estimator.see_rows(input_tensor, group, op)
        return work


class ShardVariance(GradVariance):
    """Measures over ranks and micro-batches: each backward pass of a rank is
    a sample, as each of them is averaged separately.

    Args:
        optimizer: As in the base class, with the sharded parameters.
        modules: As in the base class.
        model: The model. ``fully_shard`` was called on it and on its units.
        micro_batches: In an update.

    Raises:
        ValueError: The model is sharded in a way that is not supported.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        modules: Sequence[int],
        model: nn.Module,
        micro_batches: int,
    ) -> None:
        super().__init__(optimizer, modules)
        mesh = mesh_of(model)
        self.world_size = mesh.size()
        self.samples = self.world_size * micro_batches
        self.micro_batches = micro_batches
        self.replicas = mesh.size(0) if mesh.ndim == 2 else 1
        self.shard_group = mesh.get_group(mesh.ndim - 1)
        self.replica_group = mesh.get_group(0) if mesh.ndim == 2 else None
        #: Whether this rank sends the values that all replicas share.
        self._sends_shared = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
        self._model = model
        self._group_of: Dict[Tensor, Dict[str, Any]] = {}
        self._handles: List[Any] = []
        self._rows: Optional[Tensor] = None
        self._taken = 0
        self._reported = False
        reduction: Any = Reduction(self)
        for module in model.modules():
            if isinstance(module, unit_class()):
                module.set_custom_reduce_scatter(reduction)

    def start(self, loss_scale: Optional[Tensor] = None) -> None:
        super().start(loss_scale)
        self._forget()
        if not self.measuring:
            return
        self._group_of = {
            param: group
            for group in self.measured_groups()
            for param in group['params']
        }
        # for all parameters, as any may be in a row
        for param in self._model.parameters():
            if param.requires_grad:
                handle = param.register_post_accumulate_grad_hook(self._take)
                self._handles.append(handle)

    def drop(self) -> None:
        super().drop()
        self._forget()

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._rows, self._taken = None, 0

    def see_rows(
        self, rows: Tensor, group: dist.ProcessGroup, op: Any
    ) -> None:
        """Note the local gradients of a unit.

        Args:
            rows: Flat, one row for each rank of ``group``, each zero-padded.
            group: Ranks over which they are scattered.
            op: Operation by which they are reduced.
        """
        if op != dist.ReduceOp.AVG:
            self._spoil(
                f'gradients of shards are sent as {rows.dtype}, which torch '
                'divides before they are reduced, or are divided by another '
                'factor: reduce float32 or bfloat16, without '
                'set_gradient_divide_factor'
            )
            return
        if self._rows is not None and self._taken != self._rows.shape[1]:
            self._spoil('torch lays out gradients of shards in another way')
            return
        self._rows, self._taken = self.rows_to_take(rows, group, op), 0

    @abstractmethod
    def rows_to_take(
        self, rows: Tensor, group: dist.ProcessGroup, op: Any
    ) -> Tensor:
        """Of :meth:`see_rows`, what :meth:`take` needs, (rows, row)."""

    def _take(self, param: Tensor) -> None:
        """The hook of the parameter that has the next part of the rows."""
        rows = self._rows
        if not self.measuring or rows is None:
            return
        size = -(-param.shape[0] // dist.get_world_size(self.shard_group))
        size *= param[0].numel() if param.ndim > 1 else 1
        part = rows[:, self._taken : self._taken + size]
        self._taken += size
        read_here([rows])  # hooks have a stream of their own
        if param in self._group_of:
            self.take(param, part, self._group_of[param])

    @abstractmethod
    def take(self, param: Tensor, part: Tensor, group: Dict[str, Any]) -> None:
        """Note a parameter's part of the rows.

        Args:
            param: The sharded parameter.
            part: (rows, elements of a shard), zero-padded.
            group: The parameter group that it belongs to.
        """

    def after_backward(self, micro_batch: int) -> None:
        if not self.measuring:
            return
        if self._rows is not None and self._taken != self._rows.shape[1]:
            self._spoil('torch lays out gradients of shards in another way')
        self._rows, self._taken = None, 0

    def _spoil(self, why: str) -> None:
        """Give up this measurement, and log the reason once."""
        self.drop()
        self.spoiled = why
        if not self._reported:
            self._reported = True
            logger.warning('nothing is measured, because %s', why)

    def grad_norm(self, norm_type: float) -> Tensor:
        norm = super().grad_norm(norm_type)
        if norm_type == float('inf'):
            dist.all_reduce(norm, dist.ReduceOp.MAX, group=self.shard_group)
            return norm
        power = norm.pow(norm_type)
        dist.all_reduce(power, group=self.shard_group)
        return power.pow(1 / norm_type)


class PairsShards(Pairs, ShardVariance):
    """Every sample against every other: 2 h numbers to send.

    For Adam's family ranks also send g^2, in the units' order: v is sharded,
    too, and sum_r g_r^2 / (sqrt(v) + eps)^2 can be computed of each shard.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._squares: Dict[Tensor, Tensor] = {}

    def start(self, loss_scale: Optional[Tensor] = None) -> None:
        super().start(loss_scale)
        self._squares = {}

    def rows_to_take(
        self, rows: Tensor, group: dist.ProcessGroup, op: Any
    ) -> Tensor:
        ranks = dist.get_world_size(group)
        if not self.preconditioner.adaptive:
            return rows.view(ranks, -1)
        (unscaled,) = self.unscaled([rows.float()])
        squares = unscaled.square()
        sums = squares.new_empty(squares.numel() // ranks)
        reduce_scatter(sums, squares, group=group, op=dist.ReduceOp.SUM)
        return sums.view(1, -1)

    def take(self, param: Tensor, part: Tensor, group: Dict[str, Any]) -> None:
        if self.preconditioner.adaptive:
            shard = local_part(param)
            root = part[0, : shard.numel()].view(shard.shape).sqrt()
            scaled = self.preconditioner.by_past(group, [param], [root])
            square = squared_norms(scaled)[0]
        else:
            square = squared_norms(self.unscaled([part]))[0]
        self._squares[param] = self._squares.get(param, 0) + square

    def local_squares(self) -> Tensor:
        squares, self._squares = self._squares, {}
        self._forget()
        read_here(squares.values())

        def square_of(group: Dict[str, Any]) -> List[Tensor]:
            parts = [squares[p] for p in group['params'] if p in squares]
            if parts:
                return [torch.stack(parts).sum()]
            device = local_part(group['params'][0]).device
            return [torch.zeros((), dtype=sum_type(device), device=device)]

        # the loss of each micro-batch was divided by their number
        factor = self.micro_batches / self.world_size
        return self.sum_by_module(square_of) * factor

    def shared(self, squares: Tensor) -> Tensor:
        if not self._sends_shared:
            squares[:, 1] = 0
        dist.all_reduce(squares)
        return squares


class SplitShards(Split, ShardVariance):
    """Even ranks against odd ranks, over all micro-batches of each.

    A measured update reduces every gradient a second time, with the sign of
    the rank's half.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._signed: Dict[Tensor, Tensor] = {}

    def start(self, loss_scale: Optional[Tensor] = None) -> None:
        super().start(loss_scale)
        self._signed = {}

    def rows_to_take(
        self, rows: Tensor, group: dist.ProcessGroup, op: Any
    ) -> Tensor:
        signed = rows * (1 - 2 * (dist.get_rank() % 2))
        means = signed.new_empty(signed.numel() // dist.get_world_size(group))
        reduce_scatter(means, signed, group=group, op=op)
        return means.view(1, -1)

    def take(self, param: Tensor, part: Tensor, group: Dict[str, Any]) -> None:
        shard = local_part(param)
        new = part[0, : shard.numel()].view(shard.shape).to(shard.dtype)
        old = self._signed.get(param)
        self._signed[param] = new.clone() if old is None else old.add_(new)

    def signed(self) -> Dict[Tensor, Tensor]:
        signed, self._signed = self._signed, {}
        self._forget()
        read_here(signed.values())
        for group in self.measured_groups():
            for param in group['params']:
                if param.grad is not None and param not in signed:
                    signed[param] = torch.zeros_like(local_part(param))
        if self.replica_group is not None:
            self._average_replicas(signed)
        return signed

    def _average_replicas(self, signed: Dict[Tensor, Tensor]) -> None:
        """Replace D of each shard by its mean over the replicas."""
        params = [
            param
            for group in self.measured_groups()
            for param in group['params']
            if param in signed
        ]
        for cut in slices(params):
            flat = torch.cat([signed[param].flatten() for param in cut])
            dist.all_reduce(flat, group=self.replica_group)
            flat /= self.replicas
            sizes = [signed[param].numel() for param in cut]
            for param, part in zip(cut, flat.split(sizes)):
                signed[param] = part.view(signed[param].shape)

    def shared(self, norms: Tensor) -> Tensor:
        if not self._sends_shared:
            norms.zero_()
        dist.all_reduce(norms)
        return norms


def unit_class() -> Any:
    """The class of units.

    It is imported only where parameters are sharded, as the import is large.

    Raises:
        ValueError: This torch has none, or one that shows no gradients.
    """
    try:
        from torch.distributed.fsdp import FSDPModule

        assert hasattr(FSDPModule, 'set_custom_reduce_scatter')
    except (ImportError, AssertionError):
        raise ValueError(
            f'torch {torch.__version__} does not let AGVM see gradients of '
            'shards: use a newer version, such as 2.13, or train with '
            'MMDistributedDataParallel'
        ) from None
    return FSDPModule


def mesh_of(model: nn.Module) -> Any:
    """The device mesh over which a model is sharded.

    Raises:
        ValueError: It is sharded in a way that is not supported; the message
            says which one is.
    """
    way = 'use FullyShardStrategy, which shards as AGVM needs it'
    if not isinstance(model, unit_class()):
        raise ValueError(
            f'parameters are sharded, but the model is a '
            f'{type(model).__name__} on which fully_shard was not called: '
            f'{way}'
        )
    meshes = []
    for name, param in model.named_parameters():
        if not is_sharded(param):
            if param.requires_grad:
                raise ValueError(
                    f'{name} is not sharded, so ranks do not average its '
                    f'gradient: freeze it (requires_grad=False), or {way}'
                )
            continue
        placements = param.placements
        mesh = param.device_mesh
        kinds = [type(placement).__name__ for placement in placements]
        if (
            kinds not in (['Shard'], ['Replicate', 'Shard'])
            or placements[-1].dim != 0
        ):
            raise ValueError(
                f'{name} is sharded as {placements}, but AGVM supports only '
                f'shards of the first dimension: {way}'
            )
        meshes.append(mesh)
    mesh = meshes[0]
    if any(other != mesh for other in meshes):
        raise ValueError(f'the model is sharded over several meshes: {way}')
    if mesh.size() != dist.get_world_size() or mesh.size(mesh.ndim - 1) == 1:
        raise ValueError(
            f'the model is sharded over {mesh}, of {dist.get_world_size()} '
            'ranks: shard it over 2 or more of them, with replicas if these '
            f'are not all, or {way}'
        )
    return mesh
