"""Finds out what an optimizer does by trying a small copy of it.

Two properties of an optimizer cannot be read from its class or options. One is
whether its ``exp_avg_sq`` is Adam's second moment of each element. The other
is whether the learning rate of a parameter group scales the steps of that
group. A twin, of the same class and options, gets a few known gradients on
parameters of its own, and its state and steps show both.
"""

import copy
import inspect
import random
import sys
import warnings
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mmagvm.core.wrapped import optimizers_in

#: A matrix and a kernel, large enough for optimizers that factor, project or
#: rotate, and a vector.
SHAPES = ((40, 34), (6, 4, 2, 2), (33,))
STEPS = 4
#: Size of gradients, so small that no optimizer clips them.
SIZE = 1e-3
#: Largest number of distinct sets of options that are tried.
MOST = 4
#: Entries of a parameter group that are not options of the optimizer, or that
#: change nothing here.
OTHER = {
    *('params', 'param_names', 'module', 'lr', 'initial_lr', 'weight_decay'),
    *('lr_scale', 'param_scale', 'group_name', 'step'),
    # they change how a step is computed, not the step; some need a device
    # that the twin is not on
    *('foreach', 'fused', 'capturable', 'differentiable'),
}


class Traits(NamedTuple):
    """Properties of an optimizer; None for an unknown one."""

    #: Whether v <- beta2 v + (1 - beta2) g^2 is kept of each element.
    elementwise: Optional[bool] = None
    #: Whether a group's learning rate scales that group's steps, and no other.
    scales: Optional[bool] = None


_known: 'WeakKeyDictionary[torch.optim.Optimizer, Traits]' = (
    WeakKeyDictionary()
)


def traits_of(optimizer: torch.optim.Optimizer) -> Traits:
    """Probe an optimizer, once.

    The optimizer and the global random state do not change. If a twin cannot
    be built or stepped, all traits are unknown.
    """
    if optimizer not in _known:
        _known[optimizer] = _probe(optimizer)
    return _known[optimizer]


def param_states(
    optimizer: torch.optim.Optimizer,
) -> List[Tuple[Tensor, Dict[str, Any]]]:
    """The parameters that have a state, each with it.

    Other entries, which some optimizers keep under names, are left out.
    """
    states = []
    for group in optimizer.param_groups:
        for param in group['params']:
            # get: optimizer.state makes entries on demand
            values = optimizer.state.get(param)
            if isinstance(values, dict) and values:
                states.append((param, values))
    return states


def is_adams(param: Tensor, values: Dict[str, Any]) -> bool:
    """Whether a state may be Adam's, with v of each element.

    Beside it there may be numbers and other tensors of the parameter's shape.
    Anything else is a basis or a projection, in which v may be kept.
    """
    return isinstance(values.get('exp_avg_sq'), Tensor) and all(
        value.shape == param.shape or value.numel() == 1
        if isinstance(value, Tensor)
        else value is None or isinstance(value, (bool, int, float))
        for value in values.values()
    )


def _probe(optimizer: torch.optim.Optimizer) -> Traits:
    inside = optimizers_in(optimizer)[1:]
    if inside:
        # it may change gradients or steps of those inside; rates take effect
        # if these see the same groups
        seen = {id(group) for each in inside for group in each.param_groups}
        groups = optimizer.param_groups
        return Traits(False, all(id(group) in seen for group in groups))
    found = []
    for options in _options(optimizer):
        if 'use_muon' in options:  # its groups do not mix matrices and vectors
            return Traits()
        try:
            with _leaving_no_trace():
                found.append(_try(optimizer, options))
        except Exception:  # it may need something that is missing here
            return Traits()
    return Traits(
        all(traits.elementwise for traits in found),
        None
        if any(traits.scales is None for traits in found)
        else all(traits.scales for traits in found),
    )


@contextmanager
def _leaving_no_trace() -> Iterator[None]:
    """Keep random states outside as they are, and hide warnings."""
    state = random.getstate()
    numpy = sys.modules.get('numpy')  # if not imported, it is not used
    numpy_state = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with torch.device('cpu'):
                yield
    finally:
        random.setstate(state)
        if numpy:
            numpy.random.set_state(numpy_state)


def _options(optimizer: torch.optim.Optimizer) -> List[Dict[str, Any]]:
    """The distinct options of an optimizer's groups."""
    distinct: Dict[str, Dict[str, Any]] = {}
    for group in optimizer.param_groups:
        options = {k: v for k, v in group.items() if k not in OTHER}
        distinct.setdefault(repr(sorted(options.items())), options)
    return list(distinct.values())[:MOST]


def _try(optimizer: torch.optim.Optimizer, options: Dict[str, Any]) -> Traits:
    equal = _Twin(optimizer, options, (1.0, 1.0))
    other = _Twin(optimizer, options, (1.0, 2.0))
    elementwise = True
    for step in range(STEPS):
        elementwise &= equal.step(step)
        other.step(step)
    before, after = equal.moved(), other.moved()
    scales: Optional[bool] = None
    if all(0 < distance < float('inf') for distance in before + after):
        # 1 if both groups became faster alike, more if the second one did
        gain = after[1] / before[1] / (after[0] / before[0])
        scales = gain > 1.1
    return Traits(elementwise, scales)


class _Twin:
    """An optimizer of two groups of small parameters.

    Args:
        optimizer: The original, with its class, attributes and defaults.
        options: Options of both groups.
        rates: Factors of the groups' learning rates.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        options: Dict[str, Any],
        rates: Tuple[float, float],
    ) -> None:
        generator = torch.Generator('cpu').manual_seed(0)
        self.params = [
            [
                torch.randn(shape, generator=generator).mul_(0.02)
                for shape in SHAPES
            ]
            for _ in rates
        ]
        self.first = [[p.clone() for p in params] for params in self.params]
        lr = float(optimizer.param_groups[0]['lr']) or 1e-3
        known = inspect.signature(type(optimizer)).parameters
        given = dict(optimizer.defaults, lr=lr, weight_decay=0.0)
        self.optimizer = type(optimizer)(
            [
                dict(
                    copy.deepcopy(options),
                    params=[p.requires_grad_() for p in params],
                    lr=lr * rate,
                    **(
                        dict(weight_decay=0.0)
                        if 'weight_decay' in optimizer.param_groups[0]
                        else {}
                    ),
                )
                for params, rate in zip(self.params, rates)
            ],
            **{
                name: copy.deepcopy(value)
                for name, value in given.items()
                if name in known
                and (name not in OTHER or name in ('lr', 'weight_decay'))
            },
        )
        for name, value in vars(optimizer).items():
            if isinstance(value, (bool, int, float, str)) and hasattr(
                self.optimizer, name
            ):
                setattr(self.optimizer, name, value)

    def step(self, step: int) -> bool:
        """Step by known gradients.

        Returns:
            Whether the state is what Adam's would be, up to one factor that
            the optimizer may multiply it by afterwards.
        """
        generator = torch.Generator('cpu').manual_seed(step + 1)
        params = [p for group in self.params for p in group]
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator) * SIZE
        squares = [p.grad.square() for p in params if p.grad is not None]
        past = [self._exp_avg_sq(param) for param in params]
        self.optimizer.step()
        betas = self.optimizer.param_groups[0].get('betas', ())
        if len(betas) != 2:
            return False
        beta2 = float(betas[1])
        for param, square, v in zip(params, squares, past):
            values = self.optimizer.state.get(param)
            if not isinstance(values, dict) or not is_adams(param, values):
                return False
            expected = beta2 * v + (1 - beta2) * square
            found = values['exp_avg_sq'].detach().float()
            if found.shape != param.shape:
                return False
            factor = found.sum() / expected.sum()
            if not torch.allclose(found, factor * expected, 1e-3, 1e-30):
                return False
        return True

    def _exp_avg_sq(self, param: Tensor) -> Tensor:
        values = self.optimizer.state.get(param)
        v = values.get('exp_avg_sq') if isinstance(values, dict) else None
        if isinstance(v, Tensor) and v.shape == param.shape:
            return v.detach().float().clone()
        return torch.zeros(param.shape)

    def moved(self) -> List[float]:
        """How far the parameters of each group have moved."""
        return [
            sum(
                (param.detach() - first).square().sum().item()
                for param, first in zip(params, firsts)
            )
            ** 0.5
            for params, firsts in zip(self.params, self.first)
        ]
