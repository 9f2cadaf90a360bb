"""Which parameters belong to which module."""

from typing import Any, Dict, List, Optional, Sequence

from torch import nn

#: Children of a model that are opened into their own children.
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
        model: Whose parameters they are; not in a data-parallel wrapper.
        modules: Dotted prefixes; the longest that fits a parameter counts,
            and where none fits the parameter's module is ``others``. Defaults
            to those of :func:`find_modules`.
        groups: With options, such as ``lr`` or ``weight_decay``, for some
            parameters. Defaults to one of all, without options. A parameter
            that occurs again, being shared, keeps its first options.

    Returns:
        Groups of all trainable parameters, each in exactly one, one for each
        distinct pair of a module and options, with ``module`` and
        ``param_names``, sorted as ``modules`` are.

    Raises:
        ValueError: A module has no trainable parameters.
    """
    if modules is None:
        modules = find_modules(model)
    if groups is None:
        groups = [dict(params=list(model.parameters()))]
    names = {param: name for name, param in model.named_parameters()}
    merged: Dict[Any, Dict[str, Any]] = {}
    for group in groups:
        options = {k: v for k, v in group.items() if k != 'params'}
        for param in group['params']:
            name = names.pop(param, None)
            if name is None or not param.requires_grad:
                continue
            module = _module_of(name, modules)
            target = merged.setdefault(
                (module, repr(sorted(options.items()))),
                {'params': [], 'param_names': [], 'module': module, **options},
            )
            target['params'].append(param)
            target['param_names'].append(name)

    order = [*modules, OTHERS]
    found = sorted(merged.values(), key=lambda g: order.index(g['module']))
    empty = [m for m in modules if m not in {g['module'] for g in found}]
    if empty:
        raise ValueError(
            f'modules={list(modules)} of AGVM: {empty} have no trainable '
            f'parameters; the model has {find_modules(model)}'
        )
    return found


def find_modules(model: nn.Module) -> List[str]:
    """The modules that the paper tells apart, from a model's structure.

    Every child with trainable parameters is one, ``roi_head`` opened into its
    own children: all stages of a cascade's ``roi_head.bbox_head`` are one.
    """
    # a parameter that is shared has one name, in the module that comes first
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    prefixes = []
    for name, child in model.named_children():
        if name in CONTAINERS:
            prefixes += [
                f'{name}.{inner}' for inner, _ in child.named_children()
            ]
        else:
            prefixes.append(name)
    return [
        prefix
        for prefix in prefixes
        if any(name.startswith(f'{prefix}.') for name in names)
    ]


def _module_of(name: str, modules: Sequence[str]) -> str:
    fitting = [m for m in modules if name == m or name.startswith(f'{m}.')]
    return max(fitting, key=len, default=OTHERS)
