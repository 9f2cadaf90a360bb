"""The options that another optimizer constructor gives each parameter."""

import copy
from typing import Any, Dict, Iterator, List, Set, Tuple, Union

import torch
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


class BaseConstructor:
    """Runs a constructor with an optimizer that only records its groups.

    So any constructor works, whether it overrides ``add_params`` or makes its
    groups in ``__call__``.

    Args:
        kind: The constructor's class, or its registered name.
        optimizer_cfg: The optimizer's config.
        paramwise_cfg: The constructor's own options.

    Raises:
        ValueError: The constructor is not registered, or is AGVM's own.
    """

    def __init__(
        self,
        kind: Union[str, type],
        optimizer_cfg: Dict[str, Any],
        paramwise_cfg: Dict[str, Any],
    ) -> None:
        self.name = kind if isinstance(kind, str) else kind.__name__
        if isinstance(kind, str):
            # in the scope of the run, like the registry's own ``build``
            scope = OPTIM_WRAPPER_CONSTRUCTORS.switch_scope_and_registry(None)
            with scope as registry:
                found = registry.get(kind)
        else:
            found = kind
        if found is None:
            raise ValueError(
                f'base_constructor={self.name!r} in optim_wrapper is not '
                'registered: name the constructor of the original config and '
                'add its package to custom_imports, or leave it out'
            )
        if self.name == 'AGVMOptimWrapperConstructor':
            raise ValueError(
                f'base_constructor={self.name!r} in optim_wrapper cannot be '
                'the base of itself: name the constructor of the original '
                'config, or leave it out'
            )
        self._optimizer_type = optimizer_cfg['type']
        self._options = _Noted(copy.deepcopy(paramwise_cfg))
        self._constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
            dict(
                type=found,
                optim_wrapper_cfg=dict(
                    type='OptimWrapper',
                    optimizer={
                        **copy.deepcopy(optimizer_cfg),
                        'type': _Recorder,
                    },
                ),
                paramwise_cfg=self._options,
            )
        )
        if isinstance(self._constructor, DefaultOptimWrapperConstructor):
            # MMEngine's check reads this key, also in derived classes
            self._options.read.discard('custom_keys')

    def options_of_params(
        self, model: nn.Module
    ) -> Tuple[List[Dict[str, Any]], Dict[str, Any]]:
        """The constructor's groups, and the optimizer's config.

        Args:
            model: The model without wrappers.

        Raises:
            ValueError: A key of ``paramwise_cfg`` is not used.
        """
        given = set(dict.keys(self._options))
        optimizer = getattr(self._constructor(model), 'optimizer', None)
        unknown = sorted(given - self._options.read)
        if unknown:
            raise ValueError(
                f'paramwise_cfg key {unknown[0]!r} is not used by '
                f'{self.name}: leave it out, or set base_constructor in '
                'optim_wrapper to the constructor that it is for, such as '
                "'LearningRateDecayOptimizerConstructor' for layer-wise decay"
            )
        if not isinstance(optimizer, _Recorder):
            raise ValueError(
                f'base_constructor={self.name!r} in optim_wrapper does not '
                'build the one optimizer of optim_wrapper.optimizer, so its '
                'options cannot be read: set them in paramwise_cfg.custom_keys'
            )
        return (
            optimizer.param_groups,
            {'type': self._optimizer_type, **optimizer.defaults},
        )


class _Recorder(torch.optim.Optimizer):
    """Keeps the groups and options that it is built with; never steps."""

    def __init__(self, params: Any, **options: Any) -> None:
        groups = list(params)
        if not groups or not isinstance(groups[0], dict):
            groups = [dict(params=groups)]
        # without the base class, which refuses shared parameters
        self.param_groups = [
            {**group, 'params': _as_list(group['params'])} for group in groups
        ]
        self.defaults = options
        self.state = {}  # type: ignore[assignment]


def _as_list(params: Any) -> List[torch.Tensor]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


class _Noted(Dict[str, Any]):
    """A dict that notes which of its keys were read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.read: Set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.read.add(key)
        return super().pop(key, *default)

    # a copy of it or a loop over it may read all of it

    def __iter__(self) -> Iterator[str]:
        self.read.update(dict.keys(self))
        return super().__iter__()

    def keys(self) -> Any:
        self.read.update(dict.keys(self))
        return super().keys()

    def items(self) -> Any:
        self.read.update(dict.keys(self))
        return super().items()

    def copy(self) -> Dict[str, Any]:
        return dict(self.items())
