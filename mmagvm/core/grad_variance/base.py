"""The contract of an estimator, and what all of them share."""

from abc import ABC, abstractmethod
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import Tensor

from mmagvm.core.functional import squared_norms

from .parts import local_part
from .preconditioner import Preconditioner, find_preconditioner

#: Bytes of gradients that are sent or processed at once. Processing makes
#: copies, which for a whole module could exhaust the memory.
SLICE = 25 * 2**20  # DistributedDataParallel's default
#: Index of the module of a parameter group that is not measured.
NOT_MEASURED = -1


class Measurement(NamedTuple):
    """The result of one measured update for the h modules, on the CPU."""

    #: (h,) phi, in [0, 2]; NaN for a module without gradient.
    variance: Tensor
    #: False if a gradient was NaN or infinite; then no other value counts.
    finite: bool
    #: (h,) squared norm of the true gradient, unbiased, so maybe negative.
    signal: Optional[Tensor] = None
    #: (h,) noise power of the gradient of one sample, unbiased.
    noise: Optional[Tensor] = None
    #: (h,) squared norm of this update's gradient; 0 for a module without.
    norm: Optional[Tensor] = None
    #: (h,) part of this rank's |gradient|^2 that a narrow type loses in
    #: communication; NaN for a module without gradient.
    lost: Optional[Tensor] = None


class GradVariance(ABC):
    """Estimates the gradient variance of every module in one update.

    Call ``start`` before the forward passes of an update that is to be
    measured, and ``measure`` when its gradients are ready. On every other
    update nothing is computed, copied or sent.

    Args:
        optimizer: The optimizer of all parameters. Gradients are measured
            after its preconditioner.
        modules: Index of each parameter group's module, 0 to h - 1, or
            NOT_MEASURED.
    """

    #: Ranks whose gradients are averaged.
    world_size: int = 1
    #: Whether gradients of parameters that have been frozen are averaged, too.
    averages_unfrozen: bool = True
    #: How many gradients are compared, each of the same number of images.
    samples: int

    def __init__(
        self, optimizer: torch.optim.Optimizer, modules: Sequence[int]
    ) -> None:
        self.optimizer = optimizer
        self.modules = list(modules)
        self.measuring = False
        #: Why the measurement of this update was given up; empty if not.
        self.spoiled = ''
        #: The preconditioner of the update that is measured.
        self.preconditioner: Preconditioner = find_preconditioner(optimizer)
        self._inverse_scale: Optional[Tensor] = None

    @property
    @abstractmethod
    def can_measure(self) -> bool:
        """Whether the optimizer's state allows measuring this update."""

    def start(self, loss_scale: Optional[Tensor] = None) -> None:
        """Measure this update, if the optimizer's state allows it.

        Args:
            loss_scale: Factor by which a loss scaler multiplies all gradients
                of this update, one number on their device. None for 1.
        """
        self.preconditioner = find_preconditioner(self.optimizer)
        self.measuring = self.can_measure
        self.spoiled = ''
        self._inverse_scale = (
            None if loss_scale is None else loss_scale.reciprocal()
        )

    def before_last_backward(self) -> None:
        """Called before the forward of this update's last micro-batch."""

    def after_backward(self, micro_batch: int) -> None:
        """Called after the backward of each accumulated micro-batch.

        Args:
            micro_batch: Its number in this update, from 1.
        """

    @abstractmethod
    def measure(self, clip: Optional[Tensor] = None) -> Measurement:
        """The measurement of this update, once ``param.grad`` is ready.

        It takes one device-to-host transfer.

        Args:
            clip: Factor by which clipping will divide all gradients before
                they enter Adam's second moment. None for 1.
        """

    def to_cpu(self, sums: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """The one device-to-host transfer of a measurement.

        Args:
            sums: (h, n).

        Returns:
            The sums in float64, and ``Measurement.lost`` if it is known.
        """
        return sums.cpu().double(), None

    def drop(self) -> None:
        """Do not measure this update after all."""
        self.measuring = False

    def measured_groups(self) -> List[Dict[str, Any]]:
        """The parameter groups that belong to a module."""
        return [
            group
            for group, module in zip(self.optimizer.param_groups, self.modules)
            if module != NOT_MEASURED
        ]

    def grads(self) -> Dict[Tensor, Tensor]:
        """The gradient of every parameter that has one."""
        return {
            p: local_part(p.grad)
            for group in self.optimizer.param_groups
            for p in group['params']
            if p.grad is not None
        }

    def unscaled(
        self, grads: List[Tensor], clip: Optional[Tensor] = None
    ) -> List[Tensor]:
        """Gradients without the loss scale, divided by ``clip``.

        Squares of scaled gradients can be too large for float32.
        """
        if self._inverse_scale is not None:
            grads = list(torch._foreach_mul(grads, self._inverse_scale))
        if clip is not None:
            grads = list(torch._foreach_mul(grads, clip.reciprocal()))
        return grads

    def grad_norm(self, norm_type: float) -> Tensor:
        """The norm of all gradients together, without the loss scale."""
        grads = self.grads()
        norms = [
            norm
            for params in slices(list(grads))
            for norm in torch._foreach_norm(
                self.unscaled([grads[p] for p in params]), norm_type
            )
        ]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
        return norm

    def squares(
        self,
        group: Dict[str, Any],
        params: Sequence[Tensor],
        grads: List[Tensor],
    ) -> Tensor:
        """Squared norms of gradients of one group's parameters, (n,).

        The gradients are preconditioned by the state before this update.
        """
        grads = self.unscaled(grads)
        return squared_norms(self.preconditioner.by_past(group, params, grads))

    def sum_by_module(
        self, measure_group: Callable[[Dict[str, Any]], Iterable[Tensor]]
    ) -> Tensor:
        """Sum a quantity of parameter groups over each module.

        The order is that of the groups, never of DDP's buckets, so that a
        resumed run rounds the same although its first buckets differ.

        Args:
            measure_group: Gives tensors to be summed, always of the same
                shape; none for a group without gradient.

        Returns:
            (h, *shape), in the type and on the device of what is summed.

        Raises:
            RuntimeError: No parameter has a gradient.
        """
        sums: Dict[int, Tensor] = {}
        modules = [i for i in self.modules if i != NOT_MEASURED]
        for group, module in zip(self.measured_groups(), modules):
            for value in measure_group(group):
                sums[module] = sums.get(module, 0) + value
        if not sums:
            raise RuntimeError('AGVM: an update without any gradient')
        zero = torch.zeros_like(next(iter(sums.values())))
        return torch.stack(
            [sums.get(i, zero) for i in range(max(self.modules) + 1)]
        )


def slices(params: Sequence[Tensor]) -> List[List[Tensor]]:
    """Cut parameters into runs of one type, of about SLICE bytes each."""
    cuts: List[List[Tensor]] = []
    room = 0
    for param in params:
        size = param.numel() * param.element_size()
        room -= size
        if not cuts or room < 0 or cuts[-1][0].dtype != param.dtype:
            cuts.append([])
            room = SLICE - size
        cuts[-1].append(param)
    return cuts


def slices_with_grad(
    group: Dict[str, Any],
) -> Iterator[Tuple[List[Tensor], List[Tensor]]]:
    """A group's parameters that have a gradient, with these, in slices."""
    for params in slices([p for p in group['params'] if p.grad is not None]):
        yield params, [local_part(p.grad) for p in params]
