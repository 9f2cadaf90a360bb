"""Sorts a model's parameters into groups, one for each (module, options)."""

import inspect
from typing import Any, Dict, Optional, Sequence, Union

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import (
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
)
from torch import nn

from mmagvm.core.grad_variance import refuse_sharded_model
from mmagvm.core.modules import module_groups
from mmagvm.core.wrapped import unwrapped
from mmagvm.engine.base_constructor import BaseConstructor
from mmagvm.engine.host import keep_gradients_of_checkpointed_modules
from mmagvm.engine.optim_wrapper import AGVMOptimWrapper
from mmagvm.recipes.registry import register


@register(OPTIM_WRAPPER_CONSTRUCTORS)
class AGVMOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds the optimizer of an :class:`AGVMOptimWrapper`.

    Another constructor gives each parameter its options, by default
    MMEngine's; this one makes one parameter group for each distinct pair of a
    module and options.

    Args:
        optim_wrapper_cfg: The config of the optimizer wrapper. Its key
            ``modules`` lists the dotted prefixes of the modules; by default
            they are found by :func:`~mmagvm.core.find_modules`. Its key
            ``base_constructor`` is the type of the other constructor, such as
            'LearningRateDecayOptimizerConstructor' for layer-wise decay;
            defaults to 'DefaultOptimWrapperConstructor'.
        paramwise_cfg: Options of the other constructor.

    Raises:
        ValueError: A module of ``modules`` has no trainable parameters, or the
            model is sharded. Or the wrapper is not an AGVM one, or the other
            constructor does not use a key of ``paramwise_cfg``.
    """

    def __init__(
        self,
        optim_wrapper_cfg: Dict[str, Any],
        paramwise_cfg: Optional[Dict[str, Any]] = None,
    ) -> None:
        base: Union[str, type] = (
            optim_wrapper_cfg.get('base_constructor')
            or 'DefaultOptimWrapperConstructor'
        )
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        self.optim_wrapper_cfg.pop('base_constructor', None)
        self._base = BaseConstructor(
            base, self.optimizer_cfg, self.paramwise_cfg
        )
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
        keep_gradients_of_checkpointed_modules()
        model = unwrapped(model)
        options, optimizer_cfg = self._base.options_of_params(model)
        groups = module_groups(model, self.modules, options)
        refuse_other_arguments(optimizer_cfg['type'])
        optimizer = OPTIMIZERS.build(dict(optimizer_cfg, params=groups))
        wrapper = OPTIM_WRAPPERS.build(
            self.optim_wrapper_cfg, default_args=dict(optimizer=optimizer)
        )
        wrapper.parameters = dict(model.named_parameters())
        return wrapper


def refuse_other_arguments(kind: Union[str, type]) -> None:
    """Raise a ValueError if an optimizer does not take parameters."""
    optimizer = OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
    if not inspect.isclass(optimizer):
        return  # a function, or unknown: then building raises an error
    arguments = inspect.signature(optimizer).parameters
    if 'params' not in arguments and not any(
        argument.kind is argument.VAR_KEYWORD
        for argument in arguments.values()
    ):
        raise ValueError(
            f'optimizer.type={optimizer.__name__!r} in optim_wrapper takes '
            f'{[*arguments]} and no params, so it cannot have a group of '
            "parameters for each module: write another one, such as 'AdamW'"
        )
