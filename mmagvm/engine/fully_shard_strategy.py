"""FSDP2 (torch's ``fully_shard``) as a strategy of MMEngine's FlexibleRunner.

Every rank keeps a part of each parameter, of its gradient and of the
optimizer's state. A unit's parameters are gathered for its forward and
backward pass only. Checkpoints are those of data-parallel training.
"""

import re
from collections import OrderedDict
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import torch
import torch.distributed as dist
from mmengine._strategy import DDPStrategy, SingleDeviceStrategy
from mmengine.device import get_device
from mmengine.dist import is_distributed, is_main_process
from mmengine.registry import STRATEGIES
from mmengine.runner.activation_checkpointing import (
    turn_on_activation_checkpointing,
)
from torch import Tensor, nn

from mmagvm.engine.host import keep_gradients_of_checkpointed_modules
from mmagvm.engine.shard_units import find_units
from mmagvm.recipes.registry import register

try:  # torch >= 2.6
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    HAS_FSDP2 = True
except ImportError:
    HAS_FSDP2 = False

#: Settings of ``mixed_precision``, and whether they are types.
PRECISION = dict(
    param_dtype=True,
    reduce_dtype=True,
    output_dtype=True,
    cast_forward_inputs=False,
)


@register(STRATEGIES)
class FullyShardStrategy(DDPStrategy):
    """Trains in shards with torch's ``fully_shard``.

    Args:
        units: Regular expressions for the whole names of the modules whose
            parameters are gathered together, beside the rest of the model. A
            module should run once in a forward pass. Defaults to None, the
            repeated blocks of backbones, encoders and decoders.
        mixed_precision: ``param_dtype``, ``reduce_dtype`` and
            ``output_dtype``, each the name of a type such as 'bfloat16', and
            ``cast_forward_inputs``, of torch's MixedPrecisionPolicy. Defaults
            to None, the model's type for all.
        replicas: How many copies of the model there are, each over world size
            / replicas consecutive ranks (HSDP). Defaults to 1.
        reshard_after_forward: Whether a unit's parameters are dropped between
            its forward and backward pass, and gathered again. Defaults to
            True.
        activation_checkpointing: Names of modules that are computed again in
            the backward pass, as with the Runner's setting of that name, which
            a FlexibleRunner ignores. Defaults to none.
        find_unused_parameters: Whether ranks may use different parameters.
            Defaults to False.
        kwargs: Arguments of MMEngine's DDPStrategy, such as ``sync_bn``.

    Raises:
        ValueError: A setting cannot work with this model or these ranks.
    """

    def __init__(
        self,
        *,
        units: Union[str, Sequence[str], None] = None,
        mixed_precision: Optional[Dict[str, Any]] = None,
        replicas: int = 1,
        reshard_after_forward: bool = True,
        activation_checkpointing: Union[str, Sequence[str]] = (),
        find_unused_parameters: bool = False,
        **kwargs: Any,
    ) -> None:
        if not HAS_FSDP2:
            raise ValueError(
                f'FullyShardStrategy needs fully_shard, but torch '
                f'{torch.__version__} has none: use torch 2.6 or newer'
            )
        if kwargs.get('model_wrapper') is not None:
            raise ValueError(
                'strategy.model_wrapper is set, but FullyShardStrategy has no '
                'wrapper and shards the model in place: remove the setting'
            )
        self.policy = _policy(mixed_precision or {})
        self.units = [units] if isinstance(units, str) else units
        self.replicas = replicas
        self.reshard_after_forward = reshard_after_forward
        self.checkpointed = (
            [activation_checkpointing]
            if isinstance(activation_checkpointing, str)
            else list(activation_checkpointing)
        )
        self.find_unused_parameters = find_unused_parameters
        super().__init__(**kwargs)

    # -- sharding

    def prepare(self, model: Any, **kwargs: Any) -> Any:
        """See the base class; also counts iterations without accumulation."""
        if kwargs.get('optim_wrapper') is not None and not is_distributed():
            raise ValueError(
                "strategy.type='FullyShardStrategy' trains on several ranks: "
                'launch with tools/dist_train.sh CONFIG GPUS, or remove '
                'strategy and runner_type'
            )
        begins = not self._prepared  # otherwise it evaluates after training
        components = super().prepare(model, **kwargs)
        if begins:
            self._start_counting(0)
        return components

    def _start_counting(self, iteration: int) -> None:
        wrapper: Any = getattr(self, 'optim_wrapper', None)
        if hasattr(wrapper, 'initialize_count_status'):
            wrapper.initialize_count_status(
                self.model, iteration, self.dispatch_kwargs['max_iters']
            )

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if not is_distributed():  # evaluation in one process
            wrapped: nn.Module = SingleDeviceStrategy._wrap_model(self, model)
            return wrapped
        model = self.convert_model(model.to(get_device()))
        units = find_units(model, self.units)
        refuse_scalars(model)
        self.logger.info(
            f'FullyShardStrategy gathers {len(units)} units one at a time, '
            f'from {units[0]} to {units[-1]}, and the rest of the model'
        )
        if self.checkpointed:
            keep_gradients_of_checkpointed_modules()
            turn_on_activation_checkpointing(model, self.checkpointed)
        # as DistributedDataParallel does: ranks may differ in their seeds
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
        options: Dict[str, Any] = dict(
            mesh=self._mesh(),
            mp_policy=self.policy,
            reshard_after_forward=self.reshard_after_forward,
        )
        for name in units:
            fully_shard(model.get_submodule(name), **options)
        # torch decides for the rest, which the backward pass needs first
        fully_shard(model, **dict(options, reshard_after_forward=None))
        if self.find_unused_parameters:
            sharded: Any = model
            if not hasattr(sharded, 'set_reduce_scatter_unused_params'):
                raise ValueError(
                    'strategy.find_unused_parameters=True needs a newer torch '
                    f'than {torch.__version__}, such as 2.13'
                )
            sharded.set_reduce_scatter_unused_params(True)
        kind: Any = type(model)  # a class that torch makes for the shards
        kind.__deepcopy__ = _refuse_copy  # with a clearer error than torch's
        return model

    def _mesh(self) -> Any:
        world_size, replicas = dist.get_world_size(), self.replicas
        if (
            not isinstance(replicas, int)
            or replicas < 1
            or world_size % replicas
            or world_size // replicas < 2
        ):
            raise ValueError(
                f'strategy.replicas={replicas!r}: {world_size} ranks cannot '
                'be divided into so many equal groups of 2 or more: write a '
                f'number that divides {world_size}, or leave it out'
            )
        device = get_device()
        if replicas == 1:
            return init_device_mesh(device, (world_size,))
        return init_device_mesh(
            device,
            (replicas, world_size // replicas),
            mesh_dim_names=('replicate', 'shard'),
        )

    def build_optim_wrapper(self, *args: Any, **kwargs: Any) -> Any:
        """See the base class; the optimizer also loads whole states."""
        wrapper = super().build_optim_wrapper(*args, **kwargs)
        optimizer = getattr(wrapper, 'optimizer', None)
        if optimizer is not None and is_distributed():
            optimizer.register_load_state_dict_pre_hook(shard_state)
        return wrapper

    # -- checkpoints

    def model_state_dict(self) -> Dict[str, Any]:
        """Whole weights, on the main rank; all ranks must call it."""
        state = self.model.state_dict()
        metadata = getattr(state, '_metadata', None)
        state = whole(state, is_main_process())
        if metadata is not None:
            state._metadata = metadata
        return state  # type: ignore[no-any-return]

    def optim_state_dict(self) -> Dict[str, Any]:
        """The whole state, on the main rank; all ranks must call it."""
        state: Dict[str, Any] = whole(
            super().optim_state_dict(), is_main_process()
        )
        return state

    def save_checkpoint(self, filename: str, **kwargs: Any) -> None:
        """See the base class; all ranks must call it, and one writes."""
        if is_main_process():
            SingleDeviceStrategy.save_checkpoint(self, filename, **kwargs)
            return
        self.model_state_dict()
        if kwargs.get('save_optimizer', True) and hasattr(
            self, 'optim_wrapper'
        ):
            self.optim_state_dict()

    def load_model_state_dict(
        self,
        state_dict: Dict[str, Any],
        *,
        strict: bool = False,
        revise_keys: Sequence[Tuple[str, str]] = ((r'^module\.', ''),),
    ) -> None:
        """Load whole weights, of which each rank keeps its part."""
        own = self.model.state_dict()
        revised: Any = OrderedDict()
        for name, value in state_dict.items():
            for pattern, replacement in revise_keys:
                name = re.sub(pattern, replacement, name)
            revised[name] = sharded_as(value, own.get(name))
        if hasattr(state_dict, '_metadata'):
            revised._metadata = state_dict._metadata
        super().load_model_state_dict(revised, strict=strict, revise_keys=[])

    def resume(self, filename: str, **kwargs: Any) -> Dict[str, Any]:
        """See the base class; whole tensors are never on the GPU at once."""
        kwargs['map_location'] = 'cpu'
        checkpoint: Dict[str, Any] = super().resume(filename, **kwargs)
        self._start_counting(checkpoint['meta']['iter'])
        return checkpoint


def whole(state: Any, keep: bool) -> Any:
    """A state with whole tensors on the CPU instead of shards.

    Gathers one tensor at a time; all ranks must take part.

    Args:
        state: Tensors in dictionaries and lists.
        keep: Whether this rank keeps them; the others drop each at once.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, Tensor):
        return state.detach().cpu() if keep else None
    if isinstance(state, dict):
        return type(state)((k, whole(v, keep)) for k, v in state.items())
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, keep) for value in state)
    return state


def sharded_as(value: Any, like: Any) -> Any:
    """This rank's part of a whole tensor, where ``like`` is sharded.

    A tensor of another shape stays as it is, and MMEngine reports it.
    """
    if (
        not isinstance(like, DTensor)
        or not isinstance(value, Tensor)
        or isinstance(value, DTensor)
        or value.shape != like.shape
    ):
        return value
    return distribute_tensor(
        value.to(like.device),
        like.device_mesh,
        like.placements,
        src_data_rank=None,  # all ranks have it
    )


def shard_state(
    optimizer: torch.optim.Optimizer, state_dict: Dict[str, Any]
) -> Dict[str, Any]:
    """Cut a whole state as an optimizer of sharded parameters needs it.

    Args:
        optimizer: The optimizer, with the same groups as the state.
        state_dict: The state of an optimizer of whole parameters.
    """
    params = [p for g in optimizer.param_groups for p in g['params']]
    keys = [k for g in state_dict['param_groups'] for k in g['params']]
    param_of = dict(zip(keys, params))
    state = {
        key: {
            name: sharded_as(value, param_of.get(key))
            for name, value in values.items()
        }
        if isinstance(values, dict)
        else values
        for key, values in state_dict['state'].items()
    }
    return dict(state_dict, state=state)


def refuse_scalars(model: nn.Module) -> None:
    """Raise a ValueError if a parameter has no dimension to cut along."""
    for name, param in model.named_parameters():
        if param.ndim == 0:
            raise ValueError(
                f'{name} is a single number, which fully_shard cannot cut: '
                'train this model with MMDistributedDataParallel, or give the '
                'parameter the shape (1,)'
            )


def _policy(settings: Dict[str, Any]) -> Any:
    """torch's policy for the setting ``mixed_precision``."""
    unknown = sorted(set(settings) - set(PRECISION))
    if unknown:
        raise ValueError(
            f'strategy.mixed_precision has {unknown}: it takes '
            f'{list(PRECISION)}'
        )
    options: Dict[str, Any] = {}
    for name, value in settings.items():
        if PRECISION[name] and isinstance(value, str):
            value = getattr(torch, value, None)
        if PRECISION[name] and not isinstance(value, torch.dtype):
            raise ValueError(
                f'strategy.mixed_precision.{name}={settings[name]!r} is not a '
                "type: write one such as 'bfloat16'"
            )
        options[name] = value
    if options.get('reduce_dtype') is torch.float16:
        raise ValueError(
            "strategy.mixed_precision.reduce_dtype='float16' loses small "
            "gradients: write 'float32' or 'bfloat16'"
        )
    return MixedPrecisionPolicy(**options)


def _refuse_copy(model: nn.Module, memo: Any) -> Any:
    """Raise a ValueError instead of copying a sharded model."""
    raise ValueError(
        'a sharded model cannot be copied, as EMAHook does: remove EMAHook '
        'from custom_hooks, or train without FullyShardStrategy'
    )
