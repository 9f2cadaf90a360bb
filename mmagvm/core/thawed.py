"""Parameters that were frozen when training began and are not any more."""

import logging
from typing import Dict, List, Set

import torch
from torch import Tensor, nn

from mmagvm.core.wrapped import unwrapped

logger = logging.getLogger('mmagvm')

#: Why an update that was due is not measured.
NOT_AVERAGED = (
    'parameters that were frozen when DistributedDataParallel was built are '
    'not any more, and their gradients are not averaged'
)


def frozen_in(optimizer: torch.optim.Optimizer) -> Set[Tensor]:
    """The parameters of an optimizer that are frozen now."""
    return {
        param
        for group in optimizer.param_groups
        for param in group['params']
        if not param.requires_grad
    }


class Thawed:
    """Sees that frozen parameters are trained from some update on.

    Args:
        model: As training calls it.
        optimizer: With ``module`` in its groups, None for those that are not
            modulated.
        frozen: Of its parameters, those that have been frozen all along.
        averages_unfrozen: Whether gradients of all of these are averaged
            once they are trained.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        frozen: Set[Tensor],
        averages_unfrozen: bool,
    ) -> None:
        names: Dict[Tensor, str] = {
            param: name
            for name, param in unwrapped(model).named_parameters()
            if not param.requires_grad
        }
        module_of = {
            param: group['module']
            for group in optimizer.param_groups
            for param in group['params']
        }
        self._averaged_never = {
            param: name
            for param, name in names.items()
            if not averages_unfrozen and param in frozen
        }
        self._plain = {
            param: name
            for param, name in names.items()
            if module_of.get(param, '') is None
        }
        self._nowhere = {
            param: name
            for param, name in names.items()
            if param not in module_of
        }
        self._told: Set[str] = set()

    def spoil_the_mean(self) -> bool:
        """Whether gradients are trained on that ranks do not average.

        Says once what becomes of parameters that have been unfrozen.
        """
        self._tell(
            self._nowhere,
            'is in no parameter group, as MMEngine leaves frozen parameters '
            'out where there is a paramwise_cfg: it is never trained; '
            'unfreeze it before training starts, or leave paramwise_cfg out',
        )
        self._tell(
            self._plain,
            'has no lr_scale, as its whole module was frozen: it is trained '
            'at the plain learning rate; to have it modulated, unfreeze it '
            'before training starts, or resume from a checkpoint',
        )
        return self._tell(
            self._averaged_never,
            'is not averaged by DistributedDataParallel, which was built '
            'before: ranks drift apart, and nothing is measured any more; '
            'build the model unfrozen and freeze it in before_train, with '
            'find_unused_parameters=True, or wrap the model anew',
        )

    def _tell(self, params: Dict[Tensor, str], what: str) -> bool:
        names: List[str] = [
            name for param, name in params.items() if param.requires_grad
        ]
        if names and what not in self._told:
            self._told.add(what)
            more = f' (and {len(names) - 1} more)' if names[1:] else ''
            logger.warning(
                '%s%s was frozen when training started, is not any more, and '
                '%s',
                names[0],
                more,
                what,
            )
        return bool(names)
