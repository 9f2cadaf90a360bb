"""When AGVM measures, the scaled step, and the state that travels."""

import logging
import math
from contextlib import contextmanager, nullcontext
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor, nn

from .functional import clip_divisor
from .grad_variance import (
    COMM_HOOKS,
    ESTIMATORS,
    GradVariance,
    build_grad_variance,
)
from .grad_variance.preconditioner import Preconditioner
from .modulator import Modulator
from .optim_state import regroup


@OPTIM_WRAPPERS.register_module()
class AGVMOptimWrapper(OptimWrapper):
    """Scales every module's learning rate so that its gradient variance
    follows the anchor's (AGVM, Alg. 1 and 2).

    Every ``interval`` updates the variance phi = 1 - cos(G1, G2) of each
    module is measured from the two halves of the batch, and the module's
    multiplier becomes

        mu <- ema_decay * mu + (1 - ema_decay) * ratio,
        ratio = clip(sqrt((phi_anchor + eps) / (phi + eps)), ratio_range)

    (Eq. 41, 42). Each update then steps with ``lr * mu``; afterwards every
    learning rate is what it was, so schedulers never see mu.

    Must be built by :class:`AGVMOptimWrapperConstructor`, which sorts the
    parameters by module. Counts are in updates of the optimizer, which with
    accumulation are fewer than iterations.

    Args:
        optimizer: Any torch optimizer. phi is measured on gradients as it
            scales them, where that is known: Adam's family (Alg. 2) and SOAP;
            on raw ones else, as for SGD, LARS and Muon.
        accumulative_counts: Micro-batches in an update. Defaults to 1.
        clip_grad: As in MMEngine; does not influence mu.
        interval: tau, updates between two measurements. Defaults to 10.
        ema_decay: alpha, weight of the old mu, in [0, 1). Defaults to 0.97.
        begin: First update that is measured; until then mu is 1.
            Defaults to 0.
        end: Measuring stops before this update, mu stays. Defaults to None,
            never.
        anchor: The module that the others follow. Defaults to 'backbone'.
        estimator: How phi is estimated: 'split', the paper's, one half of
            the ranks (or micro-batches) against the other; 'pairs', each
            against each, from norms alone. Defaults to 'pairs'.
        eps: Added to both variances of the ratio. Defaults to 1e-6.
        ratio_range: Bounds of the ratio, around 1. Defaults to (0.1, 10).
        comm_hook: Type in which ranks exchange gradients, 'fp16' or 'bf16',
            by torch's communication hooks of that name. Defaults to None:
            whatever the model does by itself.
        modulate: False measures and logs everything, lr_scale too, and steps
            with the plain learning rate. Defaults to True.
        kwargs: Of the next class in line.

    Raises:
        ValueError: A setting is wrong or cannot work with this model; the
            message says what to write instead.

    Attributes:
        modulator (Modulator): phi and mu of every module.
        built_lr (list): Learning rate of each group as it was built, before
            any schedule.
        batch (dict): ``ranks``, ``images_per_rank`` and
            ``accumulative_counts`` of the run; set by :class:`AGVMHook`,
            which warns if a resumed checkpoint's differ.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        accumulative_counts: int = 1,
        clip_grad: Optional[Dict[str, Any]] = None,
        interval: int = 10,
        ema_decay: float = 0.97,
        begin: int = 0,
        end: Optional[int] = None,
        anchor: str = 'backbone',
        estimator: str = 'pairs',
        eps: float = 1e-6,
        ratio_range: Tuple[float, float] = (0.1, 10.0),
        comm_hook: Optional[str] = None,
        modulate: bool = True,
        **kwargs: Any,
    ) -> None:
        _check_settings(
            interval,
            ema_decay,
            begin,
            end,
            estimator,
            eps,
            ratio_range,
            comm_hook,
            modulate,
        )
        super().__init__(
            optimizer=optimizer,
            accumulative_counts=accumulative_counts,
            clip_grad=clip_grad,
            **kwargs,
        )
        self.interval = interval
        self.begin = begin
        self.end = end
        self.modulate = modulate
        self._group_modules = _group_modules(optimizer)
        modules = list(dict.fromkeys(self._group_modules))
        if anchor not in modules:
            raise ValueError(
                f'anchor={anchor!r} is no module with trainable parameters: '
                f'set anchor to one of {modules}'
            )
        low, high = ratio_range
        self.modulator = Modulator(
            modules, anchor, ema_decay, eps, (float(low), float(high))
        )
        self.built_lr = [float(g['lr']) for g in optimizer.param_groups]
        self.batch: Dict[str, int] = {}
        #: Names of all parameters in the order of the model, frozen ones too;
        #: set by the constructor, to read a plain optimizer's checkpoint.
        self.parameter_names: List[str] = []

        self._update = 0
        self._grad_variance: Optional[GradVariance] = None
        self.estimator = estimator
        self._comm_hook = comm_hook
        self._told_raw = False

    @property
    def update(self) -> int:
        """Updates done, which is the index of the coming one."""
        return self._update

    @property
    def attached(self) -> bool:
        """Whether the model that is trained has been seen."""
        return self._grad_variance is not None

    @property
    def world_size(self) -> int:
        """Ranks whose gradients are averaged; 1 before training starts."""
        measured = self._grad_variance
        return 1 if measured is None else measured.world_size

    @property
    def accumulative_counts(self) -> int:
        """Micro-batches in an update."""
        return int(self._accumulative_counts)

    @property
    def noise_scale(self) -> Dict[str, float]:
        """Gradient noise scale of every module in images (McCandlish 2018).

        The batch size at which the gradient's noise is as large as its
        signal: 1 until it has been measured, infinite while no signal shows.
        """
        images = images_per_sample(self.batch) if self.batch else 1
        samples = self.modulator.noise_scale
        return {
            module: images * samples[module] if module in samples else 1.0
            for module in self.modulator.modules
        }

    def set_batch(self, batch: Dict[str, int]) -> None:
        """Tell how the batch is made up, which a checkpoint may not share."""
        if self.batch:
            self.modulator.resize_samples(
                images_per_sample(batch) / images_per_sample(self.batch)
            )
        self.batch = batch

    # -- when to measure

    def initialize_count_status(
        self, model: nn.Module, init_counts: int, max_counts: int
    ) -> None:
        """See the base class; also the first sight of the wrapped model."""
        super().initialize_count_status(model, init_counts, max_counts)
        if self._update == 0:  # resumed from a checkpoint without AGVM state
            self._update = init_counts // self.accumulative_counts
        self._attach(model)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """See the base class; also decides whether to measure this update."""
        grad_variance = self._attach(model)
        if self._starts_update() and self._is_due():
            grad_variance.start(self._loss_scale())
        if grad_variance.measuring and self.should_sync():
            grad_variance.before_last_backward()
        with super().optim_context(model):
            yield

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """See the base class."""
        super().backward(loss, **kwargs)
        if self._grad_variance is not None:
            self._grad_variance.after_backward(
                (self._inner_count - 1) % self.accumulative_counts + 1
            )

    def _attach(self, model: nn.Module) -> GradVariance:
        if self._grad_variance is None:
            modules = self.modulator.modules
            self._grad_variance = build_grad_variance(
                self.estimator,
                self.optimizer,
                [modules.index(module) for module in self._group_modules],
                model,
                self.accumulative_counts,
                self._comm_hook,
            )
        return self._grad_variance

    def _starts_update(self) -> bool:
        return bool(self._inner_count % self.accumulative_counts == 0)

    def _is_due(self) -> bool:
        """Whether the update that begins now is to be measured."""
        if self._update < self.begin or (
            self.end is not None and self._update >= self.end
        ):
            return False
        complete = (
            self._max_counts < 0
            or self._inner_count + self.accumulative_counts <= self._max_counts
        )
        return complete and (self._update - self.begin) % self.interval == 0

    # -- the scaled step

    def step(self, **kwargs: Any) -> None:
        """Measure if it is time, then step with ``lr * mu`` (Alg. 1, 2)."""
        grad_variance = self._grad_variance
        if grad_variance is not None and grad_variance.measuring:
            measurement = grad_variance.measure(self._clip_divisor())
            self.modulator.update(self._update, measurement)
            self._tell_raw(grad_variance.preconditioner)
        with self._scaled_lr() if self.modulate else nullcontext():
            super().step(**kwargs)
        self._update += self._has_stepped()

    def _has_stepped(self) -> bool:
        """Whether the last :meth:`step` was an update."""
        return True

    def _clip_divisor(self) -> Optional[Tensor]:
        """By what clipping will divide gradients, where that counts.

        Adam's second moment, of clipped gradients, is compared with this
        update's.
        """
        clip = self.clip_grad_kwargs or {}
        if (
            self._grad_variance is None
            or self.estimator != 'split'
            or 'max_norm' not in clip
            or not self._grad_variance.preconditioner.adaptive
        ):
            return None
        norm = self._grad_variance.grad_norm(float(clip.get('norm_type', 2)))
        return clip_divisor(norm, float(clip['max_norm']))

    def _loss_scale(self) -> Optional[Tensor]:
        """By what a loss scaler has multiplied the gradients."""
        return None

    @contextmanager
    def _scaled_lr(self) -> Iterator[None]:
        """Put ``lr * mu`` in every group, afterwards exactly the old lr."""
        groups = self.optimizer.param_groups
        scale = self.modulator.lr_scale
        saved = [group['lr'] for group in groups]
        try:
            for group, lr, module in zip(groups, saved, self._group_modules):
                group['lr'] = lr * scale[module]
            yield
        finally:
            for group, lr in zip(groups, saved):
                group['lr'] = lr

    def _tell_raw(self, preconditioner: Preconditioner) -> None:
        """Say once if Alg. 2 might be expected but cannot be had."""
        state = self.optimizer.state
        if self._told_raw or not any(state.values()):
            return
        self._told_raw = True
        kept = set().union(*state.values()) - {'momentum_buffer'}
        if kept and not preconditioner.adaptive:
            print_log(
                f'AGVM: {type(self.optimizer).__name__} keeps '
                f'{", ".join(sorted(kept))}, from which it is not known how '
                'it scales gradients: its variance is measured on raw '
                'gradients, as for SGD',
                logger='current',
                level=logging.INFO,
            )

    # -- the state that travels

    def state_dict(self) -> Dict[str, Any]:
        """The optimizer's state, and AGVM's under the key ``agvm``."""
        state_dict: Dict[str, Any] = super().state_dict()
        state_dict['agvm'] = dict(
            self.modulator.state_dict(),
            update=self._update,
            batch=dict(self.batch),
        )
        return state_dict

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, or a plain optimizer's state.

        The optimizer's part may be grouped otherwise: by other modules, or
        by MMEngine's default constructor. Modules that the checkpoint does
        not know start with mu = 1, with a warning.

        Raises:
            ValueError: The checkpoint's optimizer is of another model.
        """
        agvm = state_dict.pop('agvm', None)
        super().load_state_dict(
            regroup(
                state_dict, self.optimizer.param_groups, self.parameter_names
            )
        )
        if agvm is None:
            print_log(
                'AGVM: the checkpoint has no AGVM state: the lr_scale of '
                f'{self.modulator.modules} starts at 1',
                logger='current',
                level=logging.WARNING,
            )
            return
        self.modulator.load_state_dict(agvm)
        self._update = agvm['update']
        self.batch = dict(agvm['batch'])


def images_per_sample(batch: Dict[str, int]) -> int:
    """Images whose mean gradient is one sample: a rank's or a micro-batch's.

    Args:
        batch: As :attr:`AGVMOptimWrapper.batch`.
    """
    several = batch['accumulative_counts'] if batch['ranks'] > 1 else 1
    return batch['images_per_rank'] * several


def _group_modules(optimizer: torch.optim.Optimizer) -> List[str]:
    """The module of every parameter group."""
    if not all('module' in group for group in optimizer.param_groups):
        raise ValueError(
            'the parameters are not grouped by module: set '
            "constructor='AGVMOptimWrapperConstructor' in optim_wrapper"
        )
    if any(group.get('lr') is None for group in optimizer.param_groups):
        raise ValueError(
            f'{type(optimizer).__name__} has no learning rate to scale: set '
            'lr in optim_wrapper.optimizer'
        )
    return [group['module'] for group in optimizer.param_groups]


def _check_settings(
    interval: int,
    ema_decay: float,
    begin: int,
    end: Optional[int],
    estimator: str,
    eps: float,
    ratio_range: Tuple[float, float],
    comm_hook: Optional[str],
    modulate: bool,
) -> None:
    """Refuse what cannot be meant."""
    in_range = (
        isinstance(ratio_range, (list, tuple))
        and len(ratio_range) == 2
        and all(map(_is_number, ratio_range))
        and 0 < ratio_range[0] <= 1 <= ratio_range[1]
    )
    checks = [
        (
            _is_count(interval) and interval >= 1,
            f'interval={interval!r}',
            'a number of updates: write 1 or more, such as 10',
        ),
        (
            _is_number(ema_decay) and 0 <= ema_decay < 1,
            f'ema_decay={ema_decay!r}',
            'the weight of the old lr_scale: write a number from 0 to below '
            '1, such as 0.97',
        ),
        (
            _is_count(begin) and begin >= 0,
            f'begin={begin!r}',
            'an update: write 0 or more',
        ),
        (
            end is None or _is_count(end) and end > begin,
            f'end={end!r}',
            f'an update after begin={begin}: write a larger one, or None to '
            'measure until training ends',
        ),
        (
            estimator in list(ESTIMATORS),
            f'estimator={estimator!r}',
            "an estimator: write 'split' or 'pairs'",
        ),
        (
            comm_hook in list(COMM_HOOKS),
            f'comm_hook={comm_hook!r}',
            "a way to send gradients: write 'fp16', 'bf16' or None",
        ),
        (
            _is_number(eps) and eps >= 0,
            f'eps={eps!r}',
            'a small number: write 0 or more, such as 1e-6',
        ),
        (
            in_range,
            f'ratio_range={ratio_range!r}',
            'a range (low, high) around 1: write one such as (0.1, 10.0)',
        ),
        (
            isinstance(modulate, bool),
            f'modulate={modulate!r}',
            'a switch: write True or False',
        ),
    ]
    for holds, setting, expected in checks:
        if not holds:
            raise ValueError(f'{setting} in optim_wrapper is not {expected}')


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )
