"""The modules that AGVM finds in a config's model."""

import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmagvm.core.modules import (
    BACKBONE,
    find_anchor,
    module_groups,
    refuse_single_module,
)
from mmagvm.errors import UsageError, refuse
from mmagvm.planning.config_reader import (
    load,
    one_line,
    scope_of,
    without_weights,
)


@dataclass
class ModelModules:
    """The modules that AGVM finds in a model.

    Attributes:
        modules: Trainable parameters of each module.
        anchor: The module that the others follow; None if there is none.
        problem: Why the model cannot be trained with AGVM; empty if it can.
        built: Whether the model could be built.
    """

    modules: Dict[str, int] = field(default_factory=dict)
    anchor: Optional[str] = None
    problem: str = ''
    built: bool = True

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        counts = ', '.join(f'{m} {n:,}' for m, n in self.modules.items())
        return f'{counts}; all follow {self.anchor}'


class ModuleReader:
    """Builds each distinct model once."""

    def __init__(self) -> None:
        self._known: Dict[str, ModelModules] = {}

    def read(self, name: str, scope: str = 'mmengine') -> ModelModules:
        """The modules of a config's model, or why there are none.

        Args:
            name: A config file, or a name such as 'mmdet::retinanet/...'.
            scope: Where its types are looked up, if it does not say.
        """
        try:
            cfg = load(name)
            if not cfg.get('model'):
                refuse('it has no model')
            scope = scope_of(cfg, scope)
            settings = cfg.get('optim_wrapper') or {}
            modules, anchor = settings.get('modules'), settings.get('anchor')
            key = repr((scope, cfg.model.to_dict(), modules, anchor))
            if key not in self._known:
                init_default_scope(scope)
                self._known[key] = _modules_of(cfg, modules, anchor)
            return self._known[key]
        except UsageError as error:
            problem = str(error).removeprefix(f'{name}: ')
            return ModelModules(problem=problem, built=False)


def package_configs(package: str) -> Path:
    """The folder of the configs that a package was installed with.

    Raises:
        UsageError: There is none.
    """
    spec = importlib.util.find_spec(package)
    folder = Path((spec and spec.origin) or '').parent / '.mim' / 'configs'
    if spec is None or not folder.is_dir():
        refuse(f'{package} is not installed with its configs in {folder}')
    return folder


def _modules_of(cfg: Config, modules: Any, anchor: Any) -> ModelModules:
    try:
        with uninitialised(), alone():
            model = MODELS.build(
                {**without_weights(cfg.model), **_no_teacher(cfg)}
            )
    except Exception as error:  # whatever a model of any author raises
        return ModelModules(
            problem=f'it cannot be built: {one_line(error)}', built=False
        )
    found = ModelModules()
    try:
        for group in module_groups(model, modules):
            trained = [p for p in group['params'] if p.requires_grad]
            if trained:
                counts = found.modules
                counts[group['module']] = counts.get(group['module'], 0) + sum(
                    param.numel() for param in trained
                )
        found.anchor = find_anchor(list(found.modules), anchor or BACKBONE)
        refuse_single_module(list(found.modules))
    except ValueError as error:
        found.problem = str(error)
    return found


def _no_teacher(cfg: Config) -> Dict[str, None]:
    """Settings that keep distillation from fetching its teacher's weights."""
    return {key: None for key in cfg.model if key == 'teacher_ckpt'}


@contextmanager
def alone() -> Iterator[None]:
    """A process group of this process alone, which MMCV's SyncBN needs."""
    if not dist.is_available() or dist.is_initialized():
        yield
        return
    dist.init_process_group(
        'gloo', store=dist.HashStore(), rank=0, world_size=1
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def uninitialised() -> Iterator[None]:
    """Skip weight initialisation, so that models are built quickly."""
    init = torch.nn.init
    names = [n for n in vars(init) if n.endswith('_') and n[0] != '_']
    saved = {name: getattr(init, name) for name in names}

    def leave(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return tensor

    try:
        for name in names:
            setattr(init, name, leave)
        yield
    finally:
        for name, function in saved.items():
            setattr(init, name, function)
