"""Which parameters belong to which module."""

import logging
from typing import Any, Dict, Iterator, List, Optional, Sequence

from torch import Tensor, nn

logger = logging.getLogger('mmagvm')

#: The module that all others follow by default, at any depth.
BACKBONE = 'backbone'
#: The module that takes its place in a model without a backbone.
ENCODER = 'image_encoder'
#: Children of a model that are split into their own children, besides those
#: that contain a backbone.
CONTAINERS = ('roi_head',)
#: The module of all parameters outside every named one.
OTHERS = 'others'


def module_groups(
    model: nn.Module,
    modules: Optional[Sequence[str]] = None,
    groups: Optional[Sequence[Dict[str, Any]]] = None,
) -> List[Dict[str, Any]]:
    """Parameter groups for an optimizer that AGVM modulates.

    Args:
        model: The model, without its data-parallel wrapper.
        modules: Dotted prefixes. A parameter belongs to the longest one that
            fits its name, and to ``others`` if none fits. Defaults to those
            of :func:`find_modules`.
        groups: Parameter groups with options, such as ``lr`` or
            ``weight_decay``. Defaults to one group of all parameters, without
            options. A parameter that occurs again keeps its first options.

    Returns:
        One group for each distinct pair of a module and options, with
        ``module`` and ``param_names``, sorted as ``modules`` are. Each
        parameter is in exactly one group, frozen ones too, as a hook may
        unfreeze them. Parameters of a module without trainable ones come
        last, with None for ``module``.

    Raises:
        ValueError: A module has no trainable parameters, or ``groups`` have
            parameters that are not the model's.
    """
    if groups is None:
        groups = [dict(params=list(model.parameters()))]
    groups = _listed(groups, model)
    # parameters of a frozen part do not belong to the others
    parts = list(_parts(model)) if modules is None else list(modules)
    names = {param: name for name, param in model.named_parameters()}
    trained = {
        _module_of(names[param], parts)
        for group in groups
        for param in group['params']
        if param in names and param.requires_grad
    }
    empty = [m for m in modules or () if m not in trained]
    if empty:
        raise ValueError(
            f'modules={parts} of AGVM: {empty} have no trainable '
            f'parameters; the model has {find_modules(model)}'
        )
    merged: Dict[Any, Dict[str, Any]] = {}
    for group in groups:
        options = {
            key: value
            for key, value in group.items()
            if key not in ('params', 'param_names', 'module')
        }
        for param in group['params']:
            name = names.pop(param, None)
            if name is None:
                continue
            part = _module_of(name, parts)
            module = part if part in trained else None
            target = merged.setdefault(
                (module, repr(sorted(options.items()))),
                {'params': [], 'param_names': [], 'module': module, **options},
            )
            target['params'].append(param)
            target['param_names'].append(name)

    order = [*parts, OTHERS, None]
    return sorted(merged.values(), key=lambda g: order.index(g['module']))


def _listed(
    groups: Sequence[Dict[str, Any]], model: nn.Module
) -> List[Dict[str, Any]]:
    """Groups with lists of parameters, all of them the model's."""
    listed = []
    rest = {param: name for name, param in model.named_parameters()}
    known = set(rest)
    for group in groups:
        params = group['params']
        params = [params] if isinstance(params, Tensor) else list(params)
        for param in params:
            if param not in known:
                raise ValueError(
                    'groups have a parameter of shape '
                    f'{tuple(param.shape)} that is not in the model: add it '
                    'to the model, or step it with another optimizer'
                )
            rest.pop(param, None)
        listed.append({**group, 'params': params})
    left = [name for param, name in rest.items() if param.requires_grad]
    if left:
        logger.warning(
            '%d trainable parameters, such as %s, are in no parameter group: '
            'they are not trained',
            len(left),
            left[0],
        )
    return listed


def find_modules(model: nn.Module) -> List[str]:
    """The modules that AGVM scales, from a model's structure.

    Every child with trainable parameters is one. ``roi_head`` is split into
    its own children: all stages of a cascade's ``roi_head.bbox_head`` are
    one module. A child that contains a backbone, at any depth, is split too:
    the student of a semi-supervised detector, the detector of a tracker.
    """
    # a shared parameter has one name, in the module that comes first
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    return [
        prefix
        for prefix in _parts(model)
        if any(name.startswith(f'{prefix}.') for name in names)
    ]


def find_anchor(modules: Sequence[str], anchor: str = BACKBONE) -> str:
    """The module that the others follow.

    Args:
        modules: Names of those that are modulated.
        anchor: Its name. The default also finds a backbone inside of another
            module: the first one that is called ``backbone`` at any depth, or
            else ``image_encoder``.

    Raises:
        ValueError: There is no such module; the message lists the modules.
    """
    if anchor in modules:
        return anchor
    for wanted in (BACKBONE, ENCODER) if anchor == BACKBONE else ():
        for module in modules:
            if module.rpartition('.')[2] == wanted:
                return module
    if not modules:
        raise ValueError('the model has no trainable parameters')
    raise ValueError(
        f'anchor={anchor!r} is not a module with trainable parameters: set '
        f'anchor to one of {list(modules)}'
    )


def refuse_single_module(modules: Sequence[str]) -> None:
    """Raise a ValueError if no module could follow the anchor."""
    if len(modules) == 1:
        raise ValueError(
            f'{modules[0]!r} is the only module with trainable parameters, so '
            'AGVM has none to modulate: name its parts by modules=[...] in '
            'optim_wrapper, without MMEngine module_groups(model, [...]), or '
            'set modulate=False'
        )


def _parts(parent: nn.Module, prefix: str = '') -> Iterator[str]:
    """Names of the parts of a model, with or without parameters."""
    for name, child in parent.named_children():
        if name != BACKBONE and (
            name in CONTAINERS
            or any(
                inner.rpartition('.')[2] == BACKBONE
                for inner, _ in child.named_modules()
            )
        ):
            yield from _parts(child, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}'


def _module_of(name: str, modules: Sequence[str]) -> str:
    fitting = [m for m in modules if name == m or name.startswith(f'{m}.')]
    return max(fitting, key=len, default=OTHERS)
