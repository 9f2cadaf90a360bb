"""Loads an optimizer's state into other parameter groups."""

import math
from typing import Any, Collection, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from mmagvm.core.agvm import logger

#: A saved parameter: its index, and its group.
Saved = Tuple[int, Dict[str, Any]]


def regroup(
    state_dict: Dict[str, Any],
    param_groups: Sequence[Dict[str, Any]],
    parameters: Dict[str, Tensor],
    options: Collection[str] = ('lr', 'weight_decay'),
) -> Dict[str, Any]:
    """Sort a saved optimizer state into ``param_groups``, by parameter name.

    Args:
        state_dict: What an optimizer wrapper saved. Its groups name their
            parameters (``param_names``), or are those of MMEngine's default
            constructor: one of all parameters, or one for each trainable one.
        param_groups: The groups to be loaded, with ``param_names`` and
            ``module``.
        parameters: All of the model's, by name and in its order, frozen ones
            too.
        options: Options that all parameters of a group must share.

    Returns:
        A state for ``param_groups``. A group's options are those that its
        parameters had. Parameters that are not in the saved state, or have
        another shape there, start without state, with a warning.

    Raises:
        ValueError: The saved parameters cannot be matched with these, or
            those of one group had different options.
    """
    saved_groups = state_dict['param_groups']
    saved = _by_name(saved_groups, parameters) or _by_order(
        state_dict, param_groups, parameters
    )
    trained = [
        name
        for group in param_groups
        for name, param in zip(group['param_names'], group['params'])
        if param.requires_grad
    ]
    _report_new([name for name in trained if name not in saved], trained)
    changed = [
        name
        for name in trained
        if name in saved
        and not _fits(
            state_dict['state'].get(saved[name][0]), parameters[name]
        )
    ]
    _report_changed(changed)

    state: Dict[int, Any] = {}
    groups: List[Dict[str, Any]] = []
    for group in param_groups:
        start = sum(len(done['params']) for done in groups)
        params = range(start, start + len(group['params']))
        known = [name for name in group['param_names'] if name in saved]
        _refuse_mixed(known, saved, options)
        values = saved[known[0]][1] if known else _decayed(group, saved_groups)
        groups.append(
            {
                **values,
                'params': list(params),
                'param_names': group['param_names'],
                'module': group['module'],
            }
        )
        for param, name in zip(params, group['param_names']):
            if name in changed or name not in saved:
                continue
            if saved[name][0] in state_dict['state']:
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


def _report_new(new: Sequence[str], names: Sequence[str]) -> None:
    """Warn of parameters that a saved state lacks; raise if it lacks all."""
    if len(new) == len(names):
        raise ValueError(
            f"the checkpoint's optimizer has none of the model's {len(new)} "
            f'parameters, such as {new[0]}: it belongs to another model. Load '
            'only its weights, with load_from and resume=False'
        )
    if new:
        logger.warning(
            "the checkpoint's optimizer does not contain %d of %d "
            'parameters, such as %s: they start without state',
            len(new),
            len(names),
            new[0],
        )


def _decayed(
    group: Dict[str, Any], saved_groups: Sequence[Dict[str, Any]]
) -> Dict[str, Any]:
    """A group that was not saved, with its lr as the schedule has it now."""
    saved = saved_groups[0]
    lr, initial = saved['lr'], saved.get('initial_lr', saved['lr'])
    return {**group, 'lr': group['lr'] * lr / initial if initial else lr}


def _report_changed(names: Sequence[str]) -> None:
    """Warn of parameters with a saved state of another shape."""
    if names:
        logger.warning(
            "the checkpoint's optimizer has %d parameter(s) in another "
            'shape, such as %s: they start without state',
            len(names),
            names[0],
        )


def _refuse_mixed(
    names: Sequence[str], saved: Dict[str, Saved], options: Collection[str]
) -> None:
    """Raise a ValueError if a group's parameters had different options."""
    for name in names[1:]:
        first, other = saved[names[0]][1], saved[name][1]
        for option in (*options, 'initial_lr'):
            if (
                option in first
                and option in other
                and not _same(first[option], other[option])
            ):
                raise ValueError(
                    f"the checkpoint's optimizer has {option}="
                    f'{first[option]} for {names[0]} and {other[option]} for '
                    f'{name}, which are in one parameter group now: set '
                    'paramwise_cfg and base_constructor in optim_wrapper as '
                    'they were for the checkpoint, or load only its weights, '
                    'with load_from and resume=False'
                )


def _same(first: Any, second: Any) -> bool:
    """Whether two options are equal up to rounding."""
    numbers = (int, float, Tensor)
    if isinstance(first, numbers) and isinstance(second, numbers):
        return math.isclose(float(first), float(second), rel_tol=1e-6)
    return bool(first == second)


def _by_name(
    saved_groups: Sequence[Dict[str, Any]], parameters: Dict[str, Tensor]
) -> Dict[str, Saved]:
    """Saved parameters by name; empty if a group has no names."""
    found: Dict[str, Saved] = {}
    for group in saved_groups:
        names = group.get('param_names') or []
        if len(names) != len(group['params']):
            return {}
        for name, index in zip(names, group['params']):
            if name not in parameters and name.startswith('module.'):
                name = name[len('module.') :]
            found[name] = index, group
    return found


def _by_order(
    state_dict: Dict[str, Any],
    param_groups: Sequence[Dict[str, Any]],
    parameters: Dict[str, Tensor],
) -> Dict[str, Saved]:
    """Names for saved parameters without them, if there is only one way.

    MMEngine's default constructor makes one group of all parameters, or one
    for each that is trained, in the order of the model.
    """
    groups = state_dict['param_groups']
    saved = [(index, group) for group in groups for index in group['params']]
    ours = {name for g in param_groups for name in g['param_names']}
    trained = [
        name
        for name, param in parameters.items()
        if name in ours and param.requires_grad
    ]
    reason = ''
    for order in (list(parameters), trained):
        if len(order) != len(saved):
            continue
        if len(groups) not in (1, len(saved)):
            reason = f'in {len(groups)} groups '
            break
        other = _first_other(order, saved, state_dict['state'], parameters)
        if other is None:
            return dict(zip(order, saved))
        reason = f'of other shapes, such as where {other} is expected, '
    raise ValueError(
        f"the checkpoint's optimizer has {len(saved)} parameters without "
        f'names {reason}and this model has {len(parameters)}, of which '
        f'{len(trained)} are trained: it belongs to another model, had other '
        'frozen parameters, or was grouped by another constructor. Load only '
        'its weights, with load_from and resume=False'
    )


def _first_other(
    names: Sequence[str],
    saved: Sequence[Saved],
    state: Dict[int, Any],
    parameters: Dict[str, Tensor],
) -> Optional[str]:
    """The first parameter with a saved state that does not fit it."""
    for name, (index, _) in zip(names, saved):
        if not _fits(state.get(index), parameters[name]):
            return name
    return None


def _fits(values: Any, param: Tensor) -> bool:
    """Whether a saved state can be that of a parameter, by its shape.

    Optimizers that factor keep rows and columns, with sizes that are among the
    parameter's. Those that project keep an object for it; any shape may fit.
    """
    if not isinstance(values, dict):
        return True
    tensors = [v for v in values.values() if isinstance(v, Tensor)]
    tensors = [tensor for tensor in tensors if tensor.numel() > 1]
    if any(tensor.shape == param.shape for tensor in tensors):
        return True
    plain = (Tensor, bool, int, float, str, list, tuple, type(None))
    if not all(isinstance(value, plain) for value in values.values()):
        return True
    sizes = {1, *param.shape}
    return all(sizes.issuperset(tensor.shape) for tensor in tensors)
