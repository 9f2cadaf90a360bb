"""The preconditioner that an optimizer applies to a gradient.

Alg. 2 compares gradients divided by sqrt(v), since that is how AdamW steps.
The same holds for any optimizer whose step is a linear map of the gradient
that is known before the update. This map is its preconditioner, and phi is
measured on preconditioned gradients. :func:`find_preconditioner` finds the
one of an optimizer.
"""

from typing import Any, Dict, List, Sequence, Tuple, Type

import torch
from torch import Tensor

from mmagvm.core.functional import adam_divisor

from .parts import local_part
from .probe import is_adams, param_states, traits_of

State = Dict[Tensor, Dict[str, Any]]


class Preconditioner:
    """No preconditioner: raw gradients. The base class of the others.

    Args:
        optimizer: Its state is read, and never changed.
    """

    #: Whether it depends on this update's gradient, which clipping changes.
    adaptive = False

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def past_known(self) -> bool:
        """Whether :meth:`by_past` can be computed in the next update."""
        return True

    @property
    def present_known(self) -> bool:
        """Whether :meth:`by_present` can be computed in the next update."""
        return True

    def by_past(
        self,
        group: Dict[str, Any],
        params: Sequence[Tensor],
        grads: List[Tensor],
    ) -> List[Tensor]:
        """Precondition gradients by the state before this update.

        Args:
            group: The parameter group of all of them.
            params: The parameters.
            grads: Gradients of a sample, in the shapes of the parameters.

        Returns:
            Tensors with the same numbers of elements, maybe in another basis.
        """
        return grads

    def by_present(
        self,
        group: Dict[str, Any],
        params: Sequence[Tensor],
        total: List[Tensor],
        signed: List[Tensor],
    ) -> Tuple[List[Tensor], List[Tensor]]:
        """Precondition S and D by the state that includes S.

        Args:
            group: As in :meth:`by_past`.
            params: As in :meth:`by_past`.
            total: S, this update's gradient.
            signed: D, in the same shapes.
        """
        return total, signed


class Elementwise(Preconditioner):
    """Adam and its family: division by sqrt(v) + eps, v as ``exp_avg_sq``."""

    adaptive = True

    @property
    def past_known(self) -> bool:
        return bool(param_states(self.optimizer))

    def by_past(
        self,
        group: Dict[str, Any],
        params: Sequence[Tensor],
        grads: List[Tensor],
    ) -> List[Tensor]:
        """Divide by sqrt(v_{t-1}) + eps.

        An element without gradient so far has no scale, and becomes zero.
        """
        grads = self.rotate(group, params, grads)
        moments = [self._exp_avg_sq(param) for param in params]
        # in place, as memory is at its peak in backward
        divided = list(torch._foreach_sqrt(moments))
        torch._foreach_add_(divided, float(group['eps']))
        for part, moment in zip(divided, moments):
            part.masked_fill_(moment == 0, torch.inf)
        torch._foreach_reciprocal_(divided)
        torch._foreach_mul_(divided, grads)
        return divided

    def by_present(
        self,
        group: Dict[str, Any],
        params: Sequence[Tensor],
        total: List[Tensor],
        signed: List[Tensor],
    ) -> Tuple[List[Tensor], List[Tensor]]:
        """Divide by sqrt(v_t) + eps (Alg. 2)."""
        total, signed = (
            self.rotate(group, params, part) for part in (total, signed)
        )
        divisor = adam_divisor(
            total,
            [self._exp_avg_sq(param) for param in params],
            float(group['betas'][1]),
            float(group['eps']),
        )
        return (
            list(torch._foreach_div(total, divisor)),
            list(torch._foreach_div(signed, divisor)),
        )

    def rotate(
        self,
        group: Dict[str, Any],
        params: Sequence[Tensor],
        grads: List[Tensor],
    ) -> List[Tensor]:
        """Gradients in the basis in which v is kept: here their own."""
        return grads

    def _exp_avg_sq(self, param: Tensor) -> Tensor:
        """v_{t-1}, zero before the parameter's first update."""
        # get: optimizer.state makes entries on demand
        values = self.optimizer.state.get(param)
        if not values or 'exp_avg_sq' not in values:
            return torch.zeros_like(local_part(param))
        return local_part(values['exp_avg_sq'])


class Rotated(Elementwise):
    """SOAP: Adam in the eigenbasis of Shampoo's statistics.

    Norms and cosines are the same in any orthogonal basis, so they are taken
    in SOAP's, where dividing by sqrt(v) + eps is elementwise.
    """

    @property
    def past_known(self) -> bool:
        # the first update makes the basis, the second one v
        return any(g.get('step', 0) > 1 for g in self.optimizer.param_groups)

    @property
    def present_known(self) -> bool:
        return bool(param_states(self.optimizer))

    def rotate(
        self,
        group: Dict[str, Any],
        params: Sequence[Tensor],
        grads: List[Tensor],
    ) -> List[Tensor]:
        state = self.optimizer.state
        return [
            self.optimizer.project(  # type: ignore[attr-defined]
                grad,
                state[param],
                merge_dims=group['merge_dims'],
                max_precondition_dim=group['max_precondition_dim'],
            )
            if state.get(param)
            else grad
            for param, grad in zip(params, grads)
        ]


def find_preconditioner(optimizer: torch.optim.Optimizer) -> Preconditioner:
    """The preconditioner of an optimizer, one for all of its parameters.

    It follows from the optimizer's class, from what :mod:`.probe` finds and
    from its state. Before the first update there is no state, and Adam's
    coefficients decide. If it is uncertain, for a single parameter or for all,
    raw gradients are measured: norms of raw and of divided gradients must not
    add up within a module.
    """
    kind: Type[Preconditioner] = Preconditioner
    if _is_soap(optimizer):
        kind = Rotated
    elif (
        all(_has_adams_options(group) for group in optimizer.param_groups)
        and all(is_adams(*state) for state in param_states(optimizer))
        and traits_of(optimizer).elementwise is not False
    ):
        kind = Elementwise
    return kind(optimizer)


def refuse_fixed_rates(optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError if multipliers of groups would have no effect."""
    if not _is_soap(optimizer) and traits_of(optimizer).scales is False:
        raise ValueError(
            f'{type(optimizer).__name__} uses one learning rate for all '
            'parameter groups together, so lr_scale would change nothing: set '
            'modulate=False in optim_wrapper to measure only, or '
            "optimizer.type to another one, such as 'AdamW'"
        )


def _is_soap(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is SOAP of pytorch_optimizer, or derived from it."""
    return (
        'SOAP' in {cls.__name__ for cls in type(optimizer).__mro__}
        and callable(getattr(optimizer, 'project', None))
        and all(
            {'merge_dims', 'max_precondition_dim'} <= set(group)
            for group in optimizer.param_groups
        )
    )


def _has_adams_options(group: Dict[str, Any]) -> bool:
    """Whether a group has Adam's coefficients, and steps as Adam would.

    Three coefficients, such as Adan's, are for a second moment of something
    else. A group of Muon has Adam's for its vectors only.
    """
    return (
        'use_muon' not in group
        and {'betas', 'eps'} <= set(group)
        and isinstance(group['betas'], (tuple, list))
        and len(group['betas']) == 2
        and isinstance(group['eps'], (int, float))
    )
