"""Sorts a model's parameters into groups, one for each (module, options)."""

from typing import Any, Dict, List, Optional, Sequence

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
from mmagvm.engine.host import keep_gradients_of_checkpointed_modules
from mmagvm.engine.optim_wrapper import AGVMOptimWrapper
from mmagvm.recipes.registry import register


@register(OPTIM_WRAPPER_CONSTRUCTORS)
class AGVMOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds the optimizer of an :class:`AGVMOptimWrapper`.

    Understands all that MMEngine's default constructor does, and makes one
    parameter group for each distinct pair of a module and its options, where
    that one makes a group for each parameter.

    Args:
        optim_wrapper_cfg: The config of the optimizer wrapper. Its key
            ``modules`` lists the dotted prefixes of the modules; by default
            they are found by :func:`~mmagvm.core.find_modules`.
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
        keep_gradients_of_checkpointed_modules()
        model = unwrapped(model)
        groups = module_groups(
            model, self.modules, self._options_of_params(model)
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
