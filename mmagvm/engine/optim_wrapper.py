"""AGVM as an optimizer wrapper of MMEngine."""

from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Dict, Iterator, Optional

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn

from mmagvm.core.agvm import AGVM, logger
from mmagvm.core.graphs import outside_of_graphs
from mmagvm.core.modulator import Modulator
from mmagvm.core.settings import Settings
from mmagvm.engine.optim_state import regroup
from mmagvm.recipes.registry import register


@register(OPTIM_WRAPPERS)
class AGVMOptimWrapper(OptimWrapper):
    """:class:`~mmagvm.core.AGVM` as an optimizer wrapper of MMEngine.

    It must be built by :class:`AGVMOptimWrapperConstructor`, which sorts the
    parameters by module.

    Args:
        optimizer: As in :class:`~mmagvm.core.AGVM`.
        accumulative_counts: Micro-batches in an update. Defaults to 1.
        clip_grad: As in MMEngine; does not influence mu.
        kwargs: The fields of :class:`~mmagvm.core.Settings`, and arguments of
            the next base class.

    Raises:
        ValueError: A setting is wrong or cannot work with this model; the
            message says what to write instead.

    Attributes:
        agvm (AGVM): It measures and modulates.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        accumulative_counts: int = 1,
        clip_grad: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
    ) -> None:
        names = {field.name for field in fields(Settings)}
        own = {key: kwargs.pop(key) for key in names & set(kwargs)}
        settings = Settings(**own)
        super().__init__(
            optimizer=optimizer,
            accumulative_counts=accumulative_counts,
            clip_grad=clip_grad,
            **kwargs,
        )
        self.agvm = AGVM(
            optimizer, settings=settings, accumulation=accumulative_counts
        )
        if 'lr' not in optimizer.defaults:
            # MMEngine would log a rate of this entry, which has none
            self.base_param_settings = None
        # the rates before any schedule
        self._built_lr = [float(g['lr']) for g in optimizer.param_groups]
        #: All parameters by name, in the order of the model; set by the
        #: constructor, to read a plain optimizer's checkpoint.
        self.parameters: Dict[str, Tensor] = {}
        #: Whether a checkpoint had a state of this optimizer.
        self.has_loaded = False
        #: Whether AGVMHook is used; the hook sets it when training starts.
        self.has_hook = False
        self._needs_hook = False

    @property
    def settings(self) -> Settings:
        """When and how AGVM measures."""
        return self.agvm.settings

    @property
    def modulator(self) -> Modulator:
        """phi and mu of every module."""
        return self.agvm.modulator

    @property
    def accumulative_counts(self) -> int:
        """Micro-batches in an update."""
        return int(self._accumulative_counts)

    # -- when to measure

    def initialize_count_status(
        self, model: nn.Module, init_counts: int, max_counts: int
    ) -> None:
        """See the base class; also attaches AGVM to the wrapped model."""
        super().initialize_count_status(model, init_counts, max_counts)
        if self.agvm.update == 0:  # from a checkpoint without AGVM state
            self.agvm.update = init_counts // self.accumulative_counts
        self.agvm.attach(model)
        self._scale_base_lr()
        self._needs_hook = True  # a Runner trains

    def _scale_base_lr(self) -> None:
        """Scale ``base_lr`` as ``auto_scale_lr`` has scaled every other rate.

        MMEngine logs it from an entry without parameters, which it does not
        scale.
        """
        base = self.base_param_settings
        if base is None:
            return
        key = 'initial_lr' if 'initial_lr' in base else 'lr'
        ratio = next(
            (
                float(group[key]) / lr
                for group, lr in zip(
                    self.optimizer.param_groups, self._built_lr
                )
                if lr
            ),
            1.0,
        )
        if base[key] == self.optimizer.defaults['lr']:
            # otherwise it is resumed, or set by the schedule
            for name in {'lr', key}:
                base[name] *= ratio

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """See the base class; also decides whether to measure this update."""
        self._before_forward(model)
        with super().optim_context(model):
            yield

    @outside_of_graphs
    def _before_forward(self, model: nn.Module) -> None:
        self._report_missing_hook()
        self.agvm.attach(model)
        if self._starts_complete_update():
            due = self.settings.is_due(self.agvm.update)
            self.agvm.begin_update(self._loss_scale() if due else None)
        self.agvm.before_forward()
        if self.should_sync():
            self.agvm.before_last_forward()

    def _report_missing_hook(self) -> None:
        if self._needs_hook and not self.has_hook:
            self._needs_hook = False
            logger.warning(
                'AGVMHook is missing: the values of AGVM are not logged, and '
                'schedulers from a checkpoint with other groups are not '
                "fitted: set custom_hooks=[dict(type='AGVMHook')]"
            )

    @outside_of_graphs
    def update_params(self, *args: Any, **kwargs: Any) -> None:
        """See the base class."""
        super().update_params(*args, **kwargs)

    @outside_of_graphs
    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """See the base class."""
        super().backward(loss, **kwargs)
        self.agvm.after_backward(
            (self._inner_count - 1) % self.accumulative_counts + 1
        )

    def _starts_complete_update(self) -> bool:
        """Whether an update begins that has all of its micro-batches."""
        end = self._inner_count + self.accumulative_counts
        return bool(
            self._inner_count % self.accumulative_counts == 0
            and (self._max_counts < 0 or end <= self._max_counts)
        )

    def _loss_scale(self) -> Optional[Tensor]:
        """The factor by which a loss scaler multiplies the gradients."""
        return None

    # -- the scaled step

    @outside_of_graphs
    def step(self, **kwargs: Any) -> None:
        """Measure if it is due, then step with ``lr * mu`` (Alg. 1, 2)."""
        self._report_missing_hook()
        self.agvm.measure(self.clip_grad_kwargs)
        with self.agvm.scaled_step():
            super().step(**kwargs)

    # -- the state in checkpoints

    def state_dict(self) -> Dict[str, Any]:
        """The optimizer's state, and AGVM's under the key ``agvm``."""
        state_dict: Dict[str, Any] = super().state_dict()
        state_dict['agvm'] = self.agvm.state_dict()
        return state_dict

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Load a state of :meth:`state_dict`, or one of a plain optimizer.

        The optimizer's part may have other groups: those of other modules, or
        of MMEngine's default constructor. Modules that are not in the
        checkpoint start with mu = 1, with a warning.

        Raises:
            ValueError: The checkpoint's optimizer is of another model, or was
                grouped by a constructor that this run does not have.
        """
        agvm = state_dict.pop('agvm', None)
        super().load_state_dict(
            regroup(
                state_dict,
                self.optimizer.param_groups,
                self.parameters,
                list(self.optimizer.defaults),
            )
        )
        self.has_loaded = True
        if agvm is not None:
            self.agvm.load_state_dict(agvm)
            return
        logger.warning(
            'the checkpoint has no AGVM state: the lr_scale of %s starts at 1',
            self.modulator.modules,
        )
