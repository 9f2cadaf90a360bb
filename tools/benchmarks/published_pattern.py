"""The published code's communication, as a baseline to compare with.

Written from its description alone. It does not use DistributedDataParallel:
after the backward pass, an all-reduce for each parameter averages its
gradient. On measured updates, each half of the ranks sums its gradients in the
same way. Then one rank of each half gathers those of the other half.
"""

from typing import Any, Dict, List, Sequence

import torch
import torch.distributed as dist
from mmengine.optim import OptimWrapper
from torch import Tensor, nn


class PublishedPattern(OptimWrapper):
    """Plain training with the collectives of the published code.

    It communicates and compares the halves, which takes the time. It does not
    modulate, so that all variants of a benchmark train alike.

    Args:
        modules: Trainable parameters of each module, the module's name first.
        interval: Updates between two measurements, the first one measured.
        kwargs: Of :class:`mmengine.optim.OptimWrapper`.

    Raises:
        ValueError: The number of ranks is odd.

    Attributes:
        variance (dict): 1 - cos(G1, G2) by module, as last measured.
    """

    def __init__(
        self, modules: Dict[str, List[Tensor]], interval: int, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.modules = modules
        self.interval = interval
        self.variance: Dict[str, float] = {}
        self._params = [p for params in modules.values() for p in params]
        self._update = 0
        self._world_size = dist.get_world_size()
        self._make_groups()

    def _make_groups(self) -> None:
        """The groups of ranks; each must be made by every rank."""
        if self._world_size % 2:
            raise ValueError(f'{self._world_size} ranks have no two halves')
        middle = self._world_size // 2
        ranks = list(range(self._world_size))
        halves = [ranks[:middle], ranks[middle:]]
        groups = [dist.new_group(half) for half in halves]
        self._half = groups[dist.get_rank() >= middle]
        #: the first rank of each half; these compare the halves
        self._leaders = [half[0] for half in halves]
        self._leader_group = dist.new_group(self._leaders)

    def step(self, **kwargs: Any) -> None:
        """Reduce the gradients, then step."""
        grads: List[Tensor] = []
        for param in self._params:
            if param.grad is None:  # every rank must join every collective
                param.grad = torch.zeros_like(param)
            grads.append(param.grad)
        if self._update % self.interval == 0:
            self._measure(grads)
        for grad in grads:
            dist.all_reduce(grad)
            grad /= self._world_size
        super().step(**kwargs)
        self._update += 1

    def _measure(self, grads: Sequence[Tensor]) -> None:
        """Compare the halves' gradients, while they are still local."""
        sums = [grad.clone() for grad in grads]
        for grad in sums:
            dist.all_reduce(grad, group=self._half)
        cosines = sums[0].new_zeros(len(self.modules))
        if dist.get_rank() in self._leaders:
            flat = torch.cat([grad.flatten() for grad in sums])
            both = [torch.empty_like(flat) for _ in self._leaders]
            dist.all_gather(both, flat, group=self._leader_group)
            cosines = _cosines(both, list(self.modules.values()))
        dist.broadcast(cosines, src=0)
        self.variance = dict(zip(self.modules, (1 - cosines).tolist()))


def _cosines(both: List[Tensor], modules: Sequence[List[Tensor]]) -> Tensor:
    sizes = [sum(p.numel() for p in params) for params in modules]
    pairs = zip(*(flat.split(sizes) for flat in both))
    return torch.stack(
        [torch.cosine_similarity(g1, g2, dim=0) for g1, g2 in pairs]
    )


def modules_of(
    model: nn.Module, names: Sequence[str]
) -> Dict[str, List[Tensor]]:
    """The trainable parameters of each of a model's submodules."""
    return {
        name: [
            param
            for param in model.get_submodule(name).parameters()
            if param.requires_grad
        ]
        for name in names
    }
