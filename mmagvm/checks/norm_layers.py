"""Norm layers over several ranks, against one over all of their images."""

from typing import Dict, List, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmagvm.checks.ranks import Ranks
from mmagvm.checks.result import NotApplicableError, fail_if
from mmagvm.checks.running import Found
from mmagvm.recipes.cgbn import CGBN

IMAGES, CHANNELS, SIZE = 2, 6, 5
TOLERANCE = 1e-4


def cross_gpu_batch_norm(ranks: Ranks) -> Found:
    """CGBN over the ranks of a node."""
    if ranks.per_node == 1:
        raise NotApplicableError(
            'one rank on each node, where CGBN is BatchNorm2d'
        )
    layer = CGBN(CHANNELS, bn_size=IMAGES * ranks.per_node)
    return _compare(layer, ranks, ranks.of_node)


def sync_batch_norm(ranks: Ranks) -> Found:
    """SyncBN over all ranks."""
    if ranks.world_size == 1:
        raise NotApplicableError('one rank, where SyncBN is BatchNorm2d')
    if ranks.device.type != 'cuda':
        raise NotApplicableError(
            f'SyncBN needs GPUs, and this is {ranks.device.type}; use CGBN '
            'here'
        )
    layer = nn.SyncBatchNorm(CHANNELS)
    return _compare(layer, ranks, list(range(ranks.world_size)))


def _compare(layer: nn.Module, ranks: Ranks, members: List[int]) -> Found:
    """A layer that spans ``members`` with BatchNorm2d on their images."""
    generator = torch.Generator().manual_seed(ranks.rank)
    shape = (2, IMAGES, CHANNELS, SIZE, SIZE)
    own, upstream = torch.randn(shape, generator=generator).to(
        ranks.device
    ) + torch.tensor([ranks.rank, 0]).view(2, 1, 1, 1, 1).to(ranks.device)
    found = _trained(layer.to(ranks.device), own, upstream)
    images, gradients = _gathered(own, members), _gathered(upstream, members)
    expected = _trained(
        nn.BatchNorm2d(CHANNELS).to(ranks.device), images, gradients
    )
    mine = members.index(ranks.rank)
    rows = slice(mine * IMAGES, (mine + 1) * IMAGES)
    largest = 0.0
    faults: List[str] = []
    for name, value in found.items():
        other = expected[name]
        if name in ('output', 'gradient'):
            other = other[rows]
        elif name == 'gradient of weight':
            value = _gathered(value[None], members).sum(0)
        error = float((value - other).abs().max())
        if not error <= TOLERANCE:
            faults.append(
                f'the {name} of {type(layer).__name__} is off by '
                f'{error:.2g}: do not train with this layer here, and report '
                'it with the JSON file'
            )
        largest = max(largest, error)
    fail_if(faults)
    return (
        f'output, gradients and statistics over {len(members)} ranks are '
        f'within {largest:.0e} of one batch norm over all images',
        dict(largest_error=largest),
    )


def _trained(
    layer: nn.Module, images: Tensor, upstream: Tensor
) -> Dict[str, Tensor]:
    """Output, gradients and statistics of one forward and backward pass."""
    images = images.clone().requires_grad_()
    output = layer(images)
    output.backward(upstream)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return {
        'output': output.detach(),
        'gradient': _present(images.grad),
        'gradient of weight': _present(weight.grad),
        'running mean': layer.get_buffer('running_mean'),
        'running variance': layer.get_buffer('running_var'),
    }


def _present(tensor: Optional[Tensor]) -> Tensor:
    assert tensor is not None
    return tensor


def _gathered(tensor: Tensor, members: List[int]) -> Tensor:
    """The members' tensors, one after the other."""
    every = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(every, tensor.contiguous())
    return torch.cat([every[member] for member in members])
