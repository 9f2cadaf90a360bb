"""Batch normalization over a group of ranks (MegDet, algorithm 1)."""

import os
import socket
from typing import Any, List, Optional, Tuple

import torch
import torch.distributed as dist
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.autograd import Function

# the function, not the layer of that name: DDP refuses the layer on a CPU,
# and EMAHook, which copies models, cannot copy the layer's process group
from torch.nn.modules._functions import SyncBatchNorm as SyncBatchNormFunction

from mmagvm.core.graphs import outside_of_graphs
from mmagvm.recipes.registry import register


@register(MODELS)
class CGBN(nn.BatchNorm2d):
    """Cross-GPU batch normalization (Peng et al., "MegDet", CVPR 2018).

    A statistic spans ``bn_size`` images, those of n = ``bn_size`` / images
    per rank consecutive ranks of one machine. With B_i the elements of a
    channel on rank i of the group, and all sums over the group::

        mu = sum_i s_i / sum_i |B_i|,        s_i = sum_{x in B_i} x
        var = sum_i v_i / sum_i |B_i|,       v_i = sum_{x in B_i} (x - mu)^2
        y = weight * (x - mu) / sqrt(var + eps) + bias

    which equals a batch norm over the ranks' concatenated images, also in its
    gradient and where images differ in size. Each sum is an all-reduce; on
    CUDA torch's kernels of SyncBatchNorm do the same. Parameters, buffers and
    evaluation are BatchNorm2d's. Running statistics are those of the rank's
    group, until MMEngine's SyncBuffersHook averages them. A single process
    normalizes its own batch, whatever ``bn_size`` is.

    A layer makes its group in the first training forward, with collectives.
    So a layer that trains must see a batch on every rank, as with SyncBN; it
    may be empty, as in a RoI head. Running statistics do not change where a
    group has fewer than two values of a channel. torch.compile leaves the
    layer out of its graphs where there are groups.

    Args:
        num_features: Channels.
        bn_size: Images in a statistic.
        images_per_rank: Images that a rank hands to this layer at once.
            Defaults to None, the length of its first training batch. Set it
            where that counts something else, as RoIs in a RoI head.
        kwargs: Of ``nn.BatchNorm2d``.

    Raises:
        ValueError: Ranks of one machine cannot make a group of ``bn_size``
            images. All ranks raise it.
    """

    def __init__(
        self,
        num_features: int,
        bn_size: int,
        images_per_rank: Optional[int] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_features, **kwargs)
        for name, value in (
            ('bn_size', bn_size),
            ('images_per_rank', images_per_rank or 1),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f'{name}={value!r} in norm_cfg of CGBN is not a number '
                    'of images: write 1 or more, such as 16'
                )
        self.bn_size = bn_size
        self.images_per_rank = images_per_rank
        # keeps no process group, which could not be copied or pickled
        self._ranks: Optional[int] = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, in training by the statistics of the group."""
        if not (self.training and dist.is_available() and _world_size() > 1):
            return super().forward(input)
        return self._group_forward(input)

    # collectives that make groups cannot be part of a graph
    @outside_of_graphs
    def _group_forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if self._ranks is None:
            self._ranks = ranks_in_group(
                self.bn_size, self.images_per_rank or len(input)
            )
        if self._ranks == 1:
            return super().forward(input)
        normalize = sync_batch_norm if input.is_cuda else group_batch_norm
        output: Tensor = normalize(
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            self._weight_of_batch(),
            rank_group(self._ranks),
            self._ranks,
        )
        return output

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, bn_size={self.bn_size}'

    def _weight_of_batch(self) -> float:
        """Count the batch, and return its weight in running statistics."""
        if self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        if self.momentum is None:  # the plain average of all batches
            return 1 / float(self.num_batches_tracked)
        return self.momentum


def group_batch_norm(
    input: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    eps: float,
    momentum: float,
    group: dist.ProcessGroup,
    ranks: int,
) -> Tensor:
    """Batch norm over the ranks of ``group``, by differentiable all-reduces.

    Args:
        input: (N, C, ...); all but C may differ between ranks.
        weight: (C,), or None.
        bias: (C,), or None.
        running_mean: (C,), updated in place, or None.
        running_var: (C,), likewise, with the unbiased variance.
        eps: Added to the variance.
        momentum: Weight of this batch in the running statistics.
        group: Of this rank.
        ranks: Unused, for the signature of torch's function.

    Returns:
        As ``input``.
    """
    # sums over a whole batch are too long for 16 bits
    x = input.float() if input.dtype.itemsize < 4 else input
    dims = [0, *range(2, x.dim())]

    def by_channel(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (x.dim() - 2))

    count = x.new_tensor([x.numel() // x.size(1)])
    sums = _GroupSum.apply(torch.cat([x.sum(dims), count]), group)
    # possibly no rank has a value: then there is nothing to normalize
    count = sums[-1].detach()
    mean = sums[:-1] / count.clamp(min=1)
    centred = x - by_channel(mean)
    squares = _GroupSum.apply(centred.square().sum(dims), group)
    var = squares / count.clamp(min=1)
    output = centred * by_channel((var + eps).rsqrt())
    if weight is not None:
        output = output * by_channel(weight)
    if bias is not None:
        output = output + by_channel(bias)
    unbiased = var * count / (count - 1).clamp(min=1)
    with torch.no_grad():
        for running, new in ((running_mean, mean), (running_var, unbiased)):
            if running is not None:
                averaged = running.lerp(new.to(running.dtype), momentum)
                running.copy_(torch.where(count > 1, averaged, running))
    return output.to(input.dtype)


class _CountingSyncBatchNorm(Function):
    """torch's function, which also returns the number of its values."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tuple[Tensor, Tensor]:
        output = SyncBatchNormFunction.forward(ctx, *args)
        *_, counts = ctx.to_save
        total = counts.sum()
        ctx.mark_non_differentiable(total)
        return output, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        return SyncBatchNormFunction.backward(ctx, grad)


def sync_batch_norm(
    input: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    *args: Any,
) -> Tensor:
    """:func:`group_batch_norm` by torch's CUDA kernels.

    If the group has no value or one, the kernels would divide by zero in the
    running statistics. Then this keeps the old ones.
    """
    kept = [
        None if b is None else b.clone() for b in (running_mean, running_var)
    ]
    output: Tensor
    output, count = _CountingSyncBatchNorm.apply(
        input, weight, bias, running_mean, running_var, *args
    )
    for running, old in zip((running_mean, running_var), kept):
        if running is not None and old is not None:
            running.copy_(torch.where(count > 1, running, old))
    return output


class _GroupSum(Function):
    """The sum over a group's ranks; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        return _GroupSum.apply(grad.contiguous(), ctx.group), None


def ranks_in_group(bn_size: int, images_per_rank: int) -> int:
    """How many ranks share a statistic; all ranks must call this at once.

    Ranks first exchange their numbers, so that all come to the same result,
    and none waits for a group that another one refuses.

    Raises:
        ValueError: See :class:`CGBN`.
    """
    seen: List[Any] = [None] * _world_size()
    dist.all_gather_object(seen, (images_per_rank, _machine()))
    images = sorted({images for images, _ in seen})
    if len(images) > 1 or images[0] == 0:
        raise ValueError(
            f'bn_size={bn_size} in norm_cfg of CGBN: the ranks hand '
            f'{images[0]} to {images[-1]} inputs to the same layer, so the '
            'number of images per rank is unknown: write images_per_rank=N '
            'next to bn_size, the batch_size of train_dataloader'
        )
    machines = [machine for _, machine in seen]
    sizes = possible_group_sizes(machines)
    if bn_size not in [images[0] * size for size in sizes]:
        raise ValueError(
            f'bn_size={bn_size} in norm_cfg of CGBN is not possible with '
            f'{images[0]} images per rank and {machines.count(machines[0])} '
            'ranks per machine: write one of '
            f'{", ".join(str(images[0] * size) for size in sizes)}, or '
            'change train_dataloader.batch_size (where the layer sees RoIs, '
            'not images, add images_per_rank)'
        )
    return bn_size // images_per_rank


def possible_group_sizes(machines: List[Any]) -> List[int]:
    """Sizes of equal groups of consecutive ranks, each on one machine.

    Args:
        machines: Of every rank, in order.
    """
    ranks = len(machines)
    return [
        size
        for size in range(1, ranks + 1)
        if ranks % size == 0
        and all(
            len(set(machines[first : first + size])) == 1
            for first in range(0, ranks, size)
        )
    ]


#: For each size, the world and this rank's group in it.
_groups: 'dict[int, Tuple[dist.ProcessGroup, dist.ProcessGroup]]' = {}


def rank_group(size: int) -> dist.ProcessGroup:
    """The group of ``size`` consecutive ranks that contains this one.

    It is made at the first call for a size. All ranks must call for sizes in
    the same order; :func:`ranks_in_group` gives them the same sizes.
    """
    world = dist.group.WORLD
    if size not in _groups or _groups[size][0] is not world:
        assert world is not None
        _groups[size] = world, dist.new_subgroups(size)[0]
    return _groups[size][1]


def _world_size() -> int:
    return int(dist.get_world_size()) if dist.is_initialized() else 1


def _machine() -> Any:
    """A value that ranks share if they are on the same machine."""
    local = os.environ.get('LOCAL_WORLD_SIZE')  # torchrun's
    return dist.get_rank() // int(local) if local else socket.gethostname()
