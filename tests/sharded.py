"""The toy, sharded by fully_shard or data-parallel, on gloo ranks."""

from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy import make_batch, make_model

from mmagvm.core import AGVM, Settings, module_groups

#: Modules that are gathered one at a time, besides the rest.
UNITS = ('backbone.0', 'backbone.2', 'neck')


def wrapped(
    model: nn.Module,
    sharded: bool,
    replicas: int = 1,
    units: Tuple[str, ...] = UNITS,
    find_unused: bool = False,
    **options: Any,
) -> nn.Module:
    """The model as training calls it."""
    if not sharded:
        return DistributedDataParallel(
            model, find_unused_parameters=find_unused
        )
    world_size = dist.get_world_size()
    mesh = (
        init_device_mesh('cpu', (world_size,))
        if replicas == 1
        else init_device_mesh(
            'cpu',
            (replicas, world_size // replicas),
            mesh_dim_names=('replicate', 'shard'),
        )
    )
    for name in units:
        fully_shard(model.get_submodule(name), mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    model.set_reduce_scatter_unused_params(find_unused)
    return model


def optimizer_of(
    kind: str, groups: List[Dict[str, Any]]
) -> torch.optim.Optimizer:
    """As the toy's config has it."""
    if kind == 'SGD':
        return torch.optim.SGD(
            groups, lr=0.05, momentum=0.9, weight_decay=0.01
        )
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.05)


def full(tensor: Any) -> torch.Tensor:
    """All of a tensor."""
    if hasattr(tensor, 'full_tensor'):
        tensor = tensor.full_tensor()
    return tensor.detach().clone()  # type: ignore[no-any-return]


def train(
    rank: int,
    sharded: bool,
    kind: str = 'SGD',
    estimator: str = 'pairs',
    accumulation: int = 1,
    stream: Tuple[int, ...] = (0, 1, 2, 3),
    max_norm: Optional[float] = None,
    loss_scale: Optional[float] = None,
    frozen: Tuple[str, ...] = (),
    settings: Optional[Dict[str, Any]] = None,
    bf16: bool = False,
    with_agvm: bool = True,
    dtype: torch.dtype = torch.float32,
    sharded_ranks: Optional[int] = None,
    poison: Optional[Tuple[int, int]] = None,
    idle_head: bool = False,
    neck_twice: bool = False,
    **wrap: Any,
) -> Dict[str, Any]:
    """The results of a few updates of the toy.

    Args:
        rank: Of this process.
        sharded: Whether parameters are.
        stream: Which batch each update takes.
        sharded_ranks: Take the batches that rank and micro-batch would get on
            so many ranks.
        poison: The rank that gets NaN in an update.
        wrap: Options of :func:`wrapped`.
    """
    model = make_model(idle_head=idle_head).to(dtype)
    if neck_twice:
        once = model.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            more: torch.Tensor = model.neck(model.backbone(x)).mean()
            return once(x) + more

        model.forward = forward  # type: ignore[method-assign]
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    if bf16:
        wrap['mp_policy'] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    outer = wrapped(model, sharded, **wrap)
    optimizer = optimizer_of(kind, module_groups(model))
    scaler = None
    if loss_scale is not None:
        scaler = torch.amp.GradScaler('cpu', init_scale=loss_scale)
    history: List[Any] = []
    if with_agvm:
        agvm = AGVM(
            optimizer,
            outer,
            Settings(
                **{
                    **dict(interval=1, ema_decay=0.5, estimator=estimator),
                    **(settings or {}),
                }
            ),
            accumulation,
        )
    for update in stream:
        for micro_batch in range(accumulation):
            place = (rank, micro_batch)
            if sharded_ranks is not None:
                place = (rank % sharded_ranks, rank // sharded_ranks)
            batch = make_batch(update, *place).to(dtype)
            if poison == (rank, update):
                batch[0] = torch.nan
            if not with_agvm:
                (outer(batch) / accumulation).backward()
                continue
            with agvm.micro_batch(scaler):
                loss = outer(batch) / accumulation
                if scaler is not None:
                    loss = scaler.scale(loss)
                loss.backward()
            agvm.step(scaler, max_norm)
        if not with_agvm:
            optimizer.step()
        elif scaler is not None:
            scaler.update()
        optimizer.zero_grad()
    if with_agvm:
        history = agvm.modulator.history
    return dict(
        history=history,
        lr_scale=dict(agvm.modulator.lr_scale) if with_agvm else {},
        noise_scale=dict(agvm.modulator.noise_scale) if with_agvm else {},
        weights={
            name: full(value) for name, value in model.state_dict().items()
        },
    )
