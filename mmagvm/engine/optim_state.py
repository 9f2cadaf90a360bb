"""Reads an optimizer's state into parameter groups that are cut otherwise."""

from itertools import chain
from typing import Any, Dict, List, Sequence, Tuple

import torch

from mmagvm.core.agvm import logger


def regroup(
    state_dict: Dict[str, Any],
    param_groups: Sequence[Dict[str, Any]],
    parameter_names: Sequence[str],
) -> Dict[str, Any]:
    """Sort a saved optimizer state into ``param_groups``, by parameter name.

    Args:
        state_dict: What an optimizer wrapper saved. Its groups name their
            parameters (``param_names``), or are those of MMEngine's default
            constructor: one of all parameters, or one for each trainable one.
        param_groups: The groups to be loaded, with ``param_names`` and
            ``module``.
        parameter_names: All of the model's parameters, in its order, frozen
            ones too. Only needed for groups without names.

    Returns:
        A state for ``param_groups``. A group's options are those that its
        first known parameter had; parameters that the saved state does not
        know start without any, with a warning.

    Raises:
        ValueError: The saved parameters cannot be matched with these.
    """
    saved_groups = state_dict['param_groups']
    names = _saved_names(saved_groups, param_groups, parameter_names)
    saved: Dict[str, Tuple[int, Dict[str, Any]]] = {
        name: (index, group)
        for group, group_names in zip(saved_groups, names)
        for name, index in zip(group_names, group['params'])
    }

    ours = [name for group in param_groups for name in group['param_names']]
    _tell_new([name for name in ours if name not in saved], ours)

    state: Dict[int, Any] = {}
    groups: List[Dict[str, Any]] = []
    for group in param_groups:
        start = sum(len(done['params']) for done in groups)
        params = range(start, start + len(group['params']))
        known = [name for name in group['param_names'] if name in saved]
        options = (
            saved[known[0]][1] if known else _decayed(group, saved_groups)
        )
        groups.append(
            {
                **options,
                'params': list(params),
                'param_names': group['param_names'],
                'module': group['module'],
            }
        )
        for param, name in zip(params, group['param_names']):
            if name in saved and saved[name][0] in state_dict['state']:
                state[param] = state_dict['state'][saved[name][0]]

    regrouped = {**state_dict, 'state': state, 'param_groups': groups}
    if len(groups) > 1:
        # MMEngine's stand-in group, whose lr is the one that schedulers and
        # logs show; a run with a single group saved none
        regrouped.setdefault(
            'base_param_settings',
            {**saved_groups[0], 'params': torch.tensor([0.0])},
        )
    return regrouped


def _tell_new(new: Sequence[str], names: Sequence[str]) -> None:
    """Warn of parameters that a saved state does not know."""
    if len(new) == len(names):
        raise ValueError(
            f"the checkpoint's optimizer knows none of the model's {len(new)} "
            f'parameters, such as {new[0]}: it is of another model; load its '
            'weights alone with load_from and resume=False'
        )
    if new:
        logger.warning(
            "the checkpoint's optimizer does not know %d of %d parameters, "
            'such as %s: they start without state',
            len(new),
            len(names),
            new[0],
        )


def _decayed(
    group: Dict[str, Any], saved_groups: Sequence[Dict[str, Any]]
) -> Dict[str, Any]:
    """A group that was not saved, with its lr where the schedule is by now."""
    saved = saved_groups[0]
    lr, initial = saved['lr'], saved.get('initial_lr', saved['lr'])
    return {**group, 'lr': group['lr'] * lr / initial if initial else lr}


def _saved_names(
    saved_groups: Sequence[Dict[str, Any]],
    param_groups: Sequence[Dict[str, Any]],
    parameter_names: Sequence[str],
) -> List[Sequence[str]]:
    """The parameter names of every saved group."""
    if all('param_names' in group for group in saved_groups):
        return [group['param_names'] for group in saved_groups]
    ours = set(chain.from_iterable(g['param_names'] for g in param_groups))
    trainable = [name for name in parameter_names if name in ours]
    count = sum(len(group['params']) for group in saved_groups)
    for order in (parameter_names, trainable):
        if len(order) == count:
            rest = iter(order)
            return [
                [next(rest) for _ in group['params']] for group in saved_groups
            ]
    raise ValueError(
        f"the checkpoint's optimizer has {count} parameters without names, "
        f'this model has {len(parameter_names)}, of which {len(trainable)} '
        'are trained: it is of another model, or was frozen elsewhere; load '
        'its weights alone with load_from and resume=False'
    )
