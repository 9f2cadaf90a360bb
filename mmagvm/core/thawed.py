"""Parameters that are unfrozen while training runs."""

import logging
from typing import Dict, List, Set

import torch
from torch import Tensor, nn

from mmagvm.core.wrapped import unwrapped

logger = logging.getLogger('mmagvm')

#: Why an update that was due is not measured.
NOT_AVERAGED = (
    'parameters that were frozen when DistributedDataParallel was built have '
    'been unfrozen, and their gradients are not averaged'
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
    """Detects frozen parameters that are trained from some update on.

    Args:
        model: As training calls it.
        optimizer: With ``module`` in its groups, None for those that are not
            modulated.
        frozen: Those of its parameters that have been frozen from the start.
        averages_unfrozen: Whether gradients of these are averaged once they
            are trained.
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
        self._reported: Set[str] = set()

    def spoil_the_mean(self) -> bool:
        """Whether a trained parameter's gradient is not averaged over ranks.

        Warns once about what happens to parameters that have been unfrozen.
        """
        self._report(
            self._nowhere,
            'is in no parameter group, as MMEngine leaves out frozen '
            'parameters where there is a paramwise_cfg. It is not trained: '
            'unfreeze it before training starts, or leave paramwise_cfg out',
        )
        self._report(
            self._plain,
            'has no lr_scale, as its whole module was frozen. It is trained '
            'at the plain learning rate: to modulate it, unfreeze it before '
            'training starts, or resume from a checkpoint',
        )
        return self._report(
            self._averaged_never,
            'is not averaged by DistributedDataParallel, which was built '
            'before. Ranks diverge, and nothing is measured: build the model '
            'unfrozen and freeze it in before_train, with '
            'find_unused_parameters=True, or wrap the model again',
        )

    def _report(self, params: Dict[Tensor, str], what: str) -> bool:
        names: List[str] = [
            name for param, name in params.items() if param.requires_grad
        ]
        if names and what not in self._reported:
            self._reported.add(what)
            more = f' (and {len(names) - 1} more)' if names[1:] else ''
            logger.warning(
                '%s%s was frozen when training started, has been unfrozen, '
                'and %s',
                names[0],
                more,
                what,
            )
        return bool(names)
