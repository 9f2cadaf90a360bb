"""The contract of an estimator, and what all of them share."""

from abc import ABC, abstractmethod
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence

import torch
from torch import Tensor


class Measurement(NamedTuple):
    """What one measured update tells of the h modules, on the CPU."""

    #: (h,) phi, in [0, 2]; NaN for a module without gradient.
    variance: Tensor
    #: False if a gradient was NaN or infinite; then nothing else counts.
    finite: bool
    #: (h,) squared norm of the true gradient, unbiased, so maybe negative.
    signal: Optional[Tensor] = None
    #: (h,) noise power of the gradient of one sample, unbiased.
    noise: Optional[Tensor] = None


class GradVariance(ABC):
    """Estimates the gradient variance of every module in one update.

    ``start`` before the forward passes of an update that is to be measured,
    ``measure`` when its gradients are ready. On every other update nothing is
    computed, copied or sent.

    Args:
        optimizer: Of all parameters; a group is measured on Alg. 2's modified
            gradients if the optimizer keeps ``exp_avg_sq`` for it.
        modules: Index of each parameter group's module, 0 to h - 1.
    """

    #: Ranks whose gradients are averaged.
    world_size: int = 1

    def __init__(
        self, optimizer: torch.optim.Optimizer, modules: Sequence[int]
    ) -> None:
        self.optimizer = optimizer
        self.modules = list(modules)
        self.measuring = False

    def start(self) -> None:
        """Collect during this update."""
        self.measuring = True

    def before_last_backward(self) -> None:
        """Called before the forward of this update's last micro-batch."""

    def after_backward(self, micro_batch: int) -> None:
        """Called after the backward of each accumulated micro-batch.

        Args:
            micro_batch: How many of this update's are done, from 1.
        """

    @abstractmethod
    def measure(self, grad_scale: Optional[Tensor] = None) -> Measurement:
        """The measurement of this update, whose ``param.grad`` is ready.

        Takes one device-to-host transfer.

        Args:
            grad_scale: What all gradients must be divided by to be what the
                optimizer will see: the loss scale, and how much clipping will
                shorten them. None for 1.
        """

    def grads(self) -> Dict[Tensor, Tensor]:
        """The gradient of every parameter that has one."""
        return {
            p: p.grad
            for group in self.optimizer.param_groups
            for p in group['params']
            if p.grad is not None
        }

    def sum_by_module(
        self, measure_group: Callable[[Dict[str, Any]], Optional[Tensor]]
    ) -> Tensor:
        """Sum a quantity of parameter groups over each module's.

        In the order of the groups, never of DDP's buckets, so that a resumed
        run, whose first buckets differ, rounds the same.

        Args:
            measure_group: Gives a tensor, always of the same shape, or None
                for a group without gradient.

        Returns:
            (h, *shape) in float64, on the device of the parameters.

        Raises:
            RuntimeError: No parameter has a gradient.
        """
        groups = self.optimizer.param_groups
        values = [measure_group(group) for group in groups]
        some = next((value for value in values if value is not None), None)
        if some is None:
            raise RuntimeError('AGVM: an update without any gradient')
        sums = [torch.zeros_like(some) for _ in range(max(self.modules) + 1)]
        for value, module in zip(values, self.modules):
            if value is not None:
                sums[module] += value
        return torch.stack(sums)


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


def exp_avg_sq(state: Dict[Tensor, Any], param: Tensor) -> Tensor:
    """v_{t-1} of a parameter, zero before its first update."""
    values = state.get(param)  # get: optimizer.state makes entries on demand
    if not values or 'exp_avg_sq' not in values:
        return torch.zeros_like(param)
    second_moment: Tensor = values['exp_avg_sq']
    return second_moment
