"""Sorts a model's parameters into groups, one for each (module, options)."""

from typing import Any, Dict, List, Optional, Sequence

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
)
from torch import nn

from .grad_variance import refuse_sharded_model
from .optim_wrapper import AGVMOptimWrapper

#: Children of a model that are opened into their own children.
CONTAINERS = ('roi_head',)
#: The module of all parameters outside every named one.
OTHERS = 'others'


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class AGVMOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds the optimizer of an :class:`AGVMOptimWrapper`.

    Understands all that MMEngine's default constructor does, and makes one
    parameter group for each distinct pair of a module and its options, where
    that one makes a group for each parameter.

    Args:
        optim_wrapper_cfg: The config of the optimizer wrapper. Its key
            ``modules`` lists the dotted prefixes of the modules; by default
            they are found by :func:`find_modules`.
        paramwise_cfg: As in MMEngine.

    Raises:
        ValueError: A module of ``modules`` has no trainable parameters, the
            wrapper is not an AGVM one, or the model is sharded.
    """

    def __init__(
        self,
        optim_wrapper_cfg: Dict[str, Any],
        paramwise_cfg: Optional[Dict[str, Any]] = None,
    ) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        self.modules: Optional[Sequence[str]] = self.optim_wrapper_cfg.pop(
            'modules', None
        )
        if self.modules is not None and (
            isinstance(self.modules, str)
            or len(set(self.modules)) < len(self.modules)
        ):
            raise ValueError(
                f'modules={self.modules!r} in optim_wrapper: write a list of '
                "prefixes, each once, such as ['backbone', 'neck'], or None"
            )
        wrapper_type = self.optim_wrapper_cfg.get('type')
        wrapper_cls = (
            OPTIM_WRAPPERS.get(wrapper_type)
            if isinstance(wrapper_type, str)
            else wrapper_type
        )
        if wrapper_cls is None or not issubclass(
            wrapper_cls, AGVMOptimWrapper
        ):
            raise ValueError(
                f'type={wrapper_type!r} in optim_wrapper does not modulate '
                'anything, so AGVMOptimWrapperConstructor does not build it: '
                "set type='AGVMOptimWrapper', or 'AGVMAmpOptimWrapper' for "
                'mixed precision'
            )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of ``model``."""
        refuse_sharded_model(model)
        model = getattr(model, 'module', model)
        groups = merge_groups(
            model,
            self._options_of_params(model),
            find_modules(model) if self.modules is None else self.modules,
        )
        optimizer = OPTIMIZERS.build(dict(self.optimizer_cfg, params=groups))
        wrapper = OPTIM_WRAPPERS.build(
            self.optim_wrapper_cfg, default_args=dict(optimizer=optimizer)
        )
        wrapper.parameter_names = [n for n, _ in model.named_parameters()]
        return wrapper

    def _options_of_params(self, model: nn.Module) -> List[Dict[str, Any]]:
        """A group for each parameter, as the default constructor makes."""
        if not self.paramwise_cfg:
            return [{'params': [param]} for param in model.parameters()]
        groups: List[Dict[str, Any]] = []
        self.add_params(groups, model)
        return groups


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


def merge_groups(
    model: nn.Module, groups: Sequence[Dict[str, Any]], modules: Sequence[str]
) -> List[Dict[str, Any]]:
    """Merge single-parameter groups by (module, options).

    Args:
        model: Whose parameters they are.
        groups: With one parameter each, in any order; a parameter that
            occurs again, being shared, keeps its first options.
        modules: Dotted prefixes; the longest that fits a parameter counts,
            and where none fits the parameter's module is ``others``.

    Returns:
        Groups of all trainable parameters, each in exactly one, with
        ``module`` and ``param_names``, sorted as ``modules`` are.

    Raises:
        ValueError: A module has no trainable parameters.
    """
    names = {param: name for name, param in model.named_parameters()}
    merged: Dict[Any, Dict[str, Any]] = {}
    for group in groups:
        (param,) = group['params']
        name = names.pop(param, None)
        if name is None or not param.requires_grad:
            continue
        options = {k: v for k, v in group.items() if k != 'params'}
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
            f'modules={list(modules)} in optim_wrapper: {empty} have no '
            f'trainable parameters; the model has {find_modules(model)}'
        )
    return found


def _module_of(name: str, modules: Sequence[str]) -> str:
    fitting = [m for m in modules if name == m or name.startswith(f'{m}.')]
    return max(fitting, key=len, default=OTHERS)
