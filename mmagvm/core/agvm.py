"""AGVM around an optimizer, in any training loop."""

import logging
import math
from contextlib import contextmanager, nullcontext
from typing import Any, Callable, Counter, Dict, Iterator, List, Optional

import torch
from torch import Tensor, nn

from mmagvm.core.functional import clip_divisor
from mmagvm.core.grad_variance import (
    NOT_MEASURED,
    GradVariance,
    Measurement,
    build_grad_variance,
    param_states,
    refuse_fixed_rates,
    refuse_sharded_state,
    refuse_sparse_gradients,
)
from mmagvm.core.graphs import outside_of_graphs
from mmagvm.core.missed import (
    NO_ANCHOR,
    NO_STATE,
    NOT_BEGUN,
    NOT_FINITE,
    OTHER_BACKWARDS,
    OWN_BACKWARD,
    PARTIAL,
    Missed,
)
from mmagvm.core.modulator import Modulator
from mmagvm.core.modules import find_anchor, refuse_single_module
from mmagvm.core.settings import Settings
from mmagvm.core.thawed import NOT_AVERAGED, Thawed, frozen_in
from mmagvm.core.wrapped import modules_in, optimizers_in

logger = logging.getLogger('mmagvm')

#: First updates of a process, in which a wrong training loop is an error.
#: Later it is a warning.
EARLY = 10
#: Part of a module's squared gradient that may be lost in communication.
LOST = 0.01


class AGVM:
    """Scales every module's learning rate so that its gradient variance
    follows the anchor's (AGVM, Alg. 1 and 2).

    Every ``interval`` updates the variance phi = 1 - cos(G1, G2) of each
    module is measured from the two halves of the batch. Then the module's
    multiplier becomes::

        mu <- ema_decay * mu + (1 - ema_decay) * ratio,
        ratio = clip(sqrt((phi_anchor + eps) / (phi + eps)), ratio_range)

    (Eq. 41, 42). Each update then steps with ``lr * mu``. Afterwards every
    learning rate is restored, so schedulers never see mu.

    In a plain loop, with gradients of K micro-batches accumulated::

        optimizer = SGD(module_groups(model), lr=0.1, momentum=0.9)
        agvm = AGVM(optimizer, ddp_model, Settings(begin=500), K)
        for batch in loader:
            with agvm.micro_batch(scaler):
                scaler.scale(ddp_model(batch) / K).backward()
            if agvm.step(scaler, max_norm=10):
                scaler.update()
                optimizer.zero_grad()

    A loop that steps in another way calls the methods that these two call.

    Args:
        optimizer: Any torch optimizer with a group of parameters for each
            module, as :func:`~mmagvm.core.modules.module_groups` makes them.
            With Adam's family (Alg. 2) and SOAP, phi is measured on gradients
            as the optimizer scales them. With others, such as SGD, LARS and
            Muon, it is measured on raw gradients.
        model: As training calls it, in its data-parallel wrapper if any. None
            if :meth:`attach` is called later.
        settings: When and how it measures. Defaults to ``Settings()``.
        accumulation: Micro-batches in an update. Defaults to 1.

    Raises:
        ValueError: A setting cannot work with this model; the message says
            what to write instead.

    Attributes:
        settings (Settings): As given.
        modulator (Modulator): phi and mu of every module.
        update (int): Updates done, which is the index of the next one.
        batch (dict): ``ranks``, ``images_per_rank`` and
            ``accumulative_counts`` of the run, and ``samples``, how many
            gradients are compared. Empty until :meth:`set_batch` is called.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: Optional[nn.Module] = None,
        settings: Optional[Settings] = None,
        accumulation: int = 1,
    ) -> None:
        self.optimizer = optimizer
        self.settings = settings or Settings()
        self.accumulation = accumulation
        self._group_modules = _group_modules(optimizer)
        refuse_sharded_state(optimizer)
        modules = list(
            dict.fromkeys(m for m in self._group_modules if m is not None)
        )
        anchor = find_anchor(modules, self.settings.anchor)
        if self.settings.modulate:
            refuse_single_module(modules)
            refuse_fixed_rates(optimizer)
        if self.settings.restart_at_lr_drop:
            _refuse_tensor_rates(optimizer)
        low, high = self.settings.ratio_range
        self.modulator = Modulator(
            modules,
            anchor,
            self.settings.ema_decay,
            self.settings.eps,
            (float(low), float(high)),
            self.settings.restart_at_lr_drop,
            self.settings.bound_by_grad_norm,
        )
        self.update = 0
        self.batch: Dict[str, Optional[int]] = {}
        self._model: Optional[nn.Module] = None
        self._inside: Optional[nn.Module] = None  # its part that was seen last
        self._frozen = frozen_in(optimizer)
        self._thawed: Optional[Thawed] = None
        self._grad_variance: Optional[GradVariance] = None
        self._micro_batches = 0  # done in this update
        self._scaler: Optional[torch.amp.GradScaler] = None
        self._stepped = False
        self._stepping = False
        self._seen_gradients = False
        self._begun = False  # whether this update was announced
        self._forwards = 0  # of this update, where the loop reports them
        self._backwards = 0
        self._counts_forwards = False
        self._done = 0  # updates done in this process
        self._last_begun = False  # whether its last micro-batch was announced
        self._reported_raw = False
        self._reported_lost = False
        self._missed = Missed()
        # a loss scaler may skip the step
        for stepping in optimizers_in(optimizer):
            stepping.register_step_post_hook(self._note_step)
        if model is not None:
            self.attach(model)

    # -- measuring

    @property
    def attached(self) -> bool:
        """Whether the model that is trained has been seen."""
        return self._grad_variance is not None

    @property
    def measuring(self) -> bool:
        """Whether the current update is measured."""
        measured = self._grad_variance
        return measured is not None and measured.measuring

    @property
    def can_measure(self) -> bool:
        """Whether the optimizer's state is enough to measure the next step."""
        measured = self._grad_variance
        return measured is not None and measured.can_measure

    @property
    def world_size(self) -> int:
        """Ranks whose gradients are averaged; 1 before training starts."""
        measured = self._grad_variance
        return 1 if measured is None else measured.world_size

    @outside_of_graphs
    def attach(self, model: nn.Module) -> None:
        """Set the model, as training calls it.

        A part of the known model counts as that model. Another model, such as
        the same one in a new wrapper, replaces it, but not during a measured
        update.

        Raises:
            ValueError: AGVM cannot measure with this model; the message says
                what works.
        """
        if model is self._model or model is self._inside or self.measuring:
            return
        if self._model is not None:
            if any(part is model for part in modules_in(self._model)):
                self._inside = model
                return
            logger.info('the model was replaced, or has a new wrapper')
            self._frozen = frozen_in(self.optimizer)
        modules = self.modulator.modules
        grad_variance = build_grad_variance(
            self.settings.estimator,
            self.optimizer,
            [
                NOT_MEASURED if module is None else modules.index(module)
                for module in self._group_modules
            ],
            model,
            self.accumulation,
            self.settings.comm_hook,
        )
        self._grad_variance, self._model, self._inside = (
            grad_variance,
            model,
            None,
        )
        self._thawed = Thawed(
            model,
            self.optimizer,
            self._frozen,
            grad_variance.averages_unfrozen,
        )

    def before_forward(self) -> None:
        """Call before each forward pass that has its own backward pass.

        Call it after :meth:`begin_update`. If a loop calls it, AGVM reports
        updates with more backward passes than forward passes.
        """
        self._counts_forwards = True
        self._forwards += 1

    @outside_of_graphs
    def begin_update(self, loss_scale: Optional[Tensor] = None) -> None:
        """Measure this update if it is due.

        Call it before the first forward pass of the update.

        Args:
            loss_scale: Factor by which a loss scaler multiplies all
                gradients, one number on their device. None for 1.
        """
        self._missed.reason = ''
        self._begun, self._last_begun = True, False
        if self._backwards == 0 or not self._has_gradients():
            self._forwards = self._backwards = 0
        if self._grad_variance is not None and self.settings.is_due(
            self.update
        ):
            self._grad_variance.start(loss_scale)
            if not self._grad_variance.measuring:
                self._missed.reason = NO_STATE

    @outside_of_graphs
    def before_last_forward(self) -> None:
        """Call before the forward pass of the update's last micro-batch."""
        self._last_begun = True
        if self._missed.reason == NOT_BEGUN:
            self._missed.reason = PARTIAL
        if self._grad_variance is not None and self._grad_variance.measuring:
            self._grad_variance.before_last_backward()

    @outside_of_graphs
    def after_backward(self, micro_batch: int) -> None:
        """Call after the backward pass of each accumulated micro-batch.

        Args:
            micro_batch: Its number in this update, from 1.
        """
        if not self._seen_gradients:
            self._seen_gradients = True
            refuse_sparse_gradients(self.optimizer)
        self._backwards += 1
        if self._grad_variance is not None:
            self._grad_variance.after_backward(micro_batch)

    @outside_of_graphs
    def measure(self, clip_grad: Optional[Dict[str, Any]] = None) -> None:
        """Compute new multipliers, if this update is measured.

        Call it before gradients are unscaled or clipped.

        Args:
            clip_grad: How gradients will be clipped, as in MMEngine.

        Raises:
            ValueError: One of the first updates of a training does not have
                ``accumulation`` backward passes, each with its own forward
                pass. Later updates cause a warning instead.
        """
        wrong = self._wrong_backwards()
        if wrong and self._done < EARLY:
            raise ValueError(wrong)
        if wrong:
            self._missed.reason = OTHER_BACKWARDS
        grad_variance = self._grad_variance
        if grad_variance is None:
            return
        if not grad_variance.measuring:
            self._missed.reason = self._missed.reason or grad_variance.spoiled
            return
        if self._unseen():
            grad_variance.drop()
            return
        measurement = grad_variance.measure(self._clip_divisor(clip_grad))
        known = self.modulator.measured
        self.modulator.update(self.update, measurement, self._lr())
        if self.modulator.measured == known:
            self._missed.reason = (
                NO_ANCHOR if measurement.finite else NOT_FINITE
            )
        self._report_raw(grad_variance)
        self._report_lost(measurement)

    def _lr(self) -> float:
        """The schedule's highest learning rate, if a setting needs it."""
        if not self.settings.restart_at_lr_drop:
            return 0.0
        return max(float(group['lr']) for group in self.optimizer.param_groups)

    def _wrong_backwards(self) -> str:
        """Why the number of backward passes is wrong; empty if it is not.

        Zero is accepted here: AGVM does not see calls of ``loss.backward()``.
        """
        done, forwards = self._backwards, self._forwards
        if done and self._counts_forwards and done > forwards:
            return (
                f'an update has {done} backward passes and {forwards} forward '
                'passes in optim_context, but AGVM needs one backward pass '
                'for each forward pass: add up the losses of a batch and call '
                'update_params once in each optim_context'
            )
        if done and self._begun and done != self.accumulation:
            return (
                f'an update has {done} backward passes where '
                f'accumulative_counts={self.accumulation}: add up the losses '
                'of a batch and call update_params once, or set '
                f'accumulative_counts={done} in optim_wrapper, without '
                f'MMEngine AGVM(..., accumulation={done})'
            )
        return ''

    def _has_gradients(self) -> bool:
        """Whether gradients remain from a backward pass without a step."""
        return any(
            param.grad is not None and bool(param.grad.any())
            for group in self.optimizer.param_groups
            for param in group['params']
        )

    def _unseen(self) -> bool:
        """Whether this update's gradients cannot be measured after all.

        Sets the reason for which they cannot.
        """
        if self.world_size == 1 and self._backwards == 0:
            self._missed.reason = OWN_BACKWARD
        elif self.world_size > 1 and not self._last_begun:
            self._missed.reason = PARTIAL
        elif self._thawed is not None and self._thawed.spoil_the_mean():
            self._missed.reason = NOT_AVERAGED
        return bool(self._missed.reason)

    def _clip_divisor(
        self, clip_grad: Optional[Dict[str, Any]]
    ) -> Optional[Tensor]:
        """The factor by which clipping will divide gradients, if it matters.

        It matters where this update's gradients enter Adam's second moment,
        which is one of clipped gradients.
        """
        if (
            self._grad_variance is None
            or self.settings.estimator != 'split'
            or 'max_norm' not in (clip_grad or {})
            or not self._grad_variance.preconditioner.adaptive
        ):
            return None
        assert clip_grad is not None
        norm = self._grad_variance.grad_norm(
            float(clip_grad.get('norm_type', 2))
        )
        return clip_divisor(norm, float(clip_grad['max_norm']))

    def _report_raw(self, grad_variance: GradVariance) -> None:
        """Log once if Alg. 2 cannot be used though it may be expected."""
        if self._reported_raw:
            return
        states = param_states(self.optimizer)
        if not states:
            return
        self._reported_raw = True
        kept = {str(key) for _, values in states for key in values}
        kept.discard('momentum_buffer')
        if kept and not grad_variance.preconditioner.adaptive:
            logger.info(
                '%s keeps %s, but AGVM does not know how it scales gradients: '
                'the variance is measured on raw gradients, as for SGD',
                type(self.optimizer).__name__,
                ', '.join(sorted(kept)),
            )

    def _report_lost(self, measurement: Measurement) -> None:
        """Warn once if float16 loses much of a module's gradient."""
        if measurement.lost is None or self._reported_lost:
            return
        lost, module = measurement.lost.nan_to_num(0, 0).max(0)
        if lost > LOST:
            self._reported_lost = True
            logger.warning(
                'a communication hook sends gradients in float16, which loses '
                '%.0f %% of the squared gradient of %s. Its small elements '
                'become zero, their weights are not trained, and the variance '
                "is wrong: set comm_hook='bf16' (with NCCL) or None, or train "
                'with a loss scaler',
                100 * lost.item(),
                self.modulator.modules[int(module)],
            )

    # -- the scaled step

    @contextmanager
    def scaled_step(self) -> Iterator[None]:
        """Context of the optimizer's step, which uses ``lr * mu``.

        Afterwards each learning rate is restored, except for a change that
        the optimizer itself makes in its step.

        Counts the update, unless a loss scaler skips it.
        """
        groups = self.optimizer.param_groups
        if len(groups) != len(self._group_modules):
            raise RuntimeError(
                f'the optimizer has {len(groups)} parameter groups, and had '
                f'{len(self._group_modules)} when AGVM was created: add all '
                'parameters before that, frozen ones too'
            )
        saved = [group['lr'] for group in groups]
        scale = [
            self.modulator.lr_scale[module]
            if self.settings.modulate and module is not None
            else None
            for module in self._group_modules
        ]
        self._stepped, self._stepping = False, True
        given = [lr if mu is None else lr * mu for lr, mu in zip(saved, scale)]
        try:
            for group, lr in zip(groups, given):
                group['lr'] = lr
            yield
        finally:
            for group, lr, own, mu in zip(groups, given, saved, scale):
                group['lr'] = _restored(group['lr'], lr, own, mu)
            self._stepping = False
        self._missed.end_update(self.update, self.settings.is_due(self.update))
        self.update += self._stepped
        self._done += self._stepped
        self._forwards = self._backwards = 0
        self._begun = False

    def _note_step(self, *_: Any) -> None:
        self._stepped = True
        if not self._stepping:
            self._missed.other_step()

    @property
    def missed(self) -> Counter[str]:
        """The number of updates that were due and not measured, by reason."""
        return self._missed.counts

    def why_missed(self) -> str:
        """Why updates were not measured, the most frequent reason first.

        Empty if none was missed.
        """
        return str(self._missed)

    # -- for a plain loop

    @contextmanager
    def micro_batch(
        self, scaler: Optional['torch.amp.GradScaler'] = None
    ) -> Iterator[None]:
        """Context of the one forward and backward pass of a micro-batch.

        Ranks exchange gradients only in the last micro-batch of an update. An
        error inside abandons the update: zero the gradients, and start again
        with its first micro-batch.

        Args:
            scaler: The loss scaler, if there is one.
        """
        if self._model is None:
            raise ValueError(
                'AGVM does not know the model: write AGVM(optimizer, model)'
            )
        if self._micro_batches == self.accumulation:
            raise RuntimeError(
                f'AGVM: {self.accumulation} micro-batches are done without a '
                'step: call agvm.step() after each micro-batch'
            )
        last = self._micro_batches == self.accumulation - 1
        if self._micro_batches == 0:
            self._scaler = scaler
            due = self.settings.is_due(self.update)
            self.begin_update(
                scale_of(scaler, self.optimizer) if due else None
            )
        self.before_forward()
        if last:
            self.before_last_forward()
        no_sync: Callable[[], Any] = nullcontext
        if not last:
            no_sync = getattr(self._model, 'no_sync', nullcontext)
        try:
            with no_sync():
                yield
        except BaseException:
            self.abandon_update()
            raise
        self._micro_batches += 1
        self.after_backward(self._micro_batches)

    def abandon_update(self) -> None:
        """Discard the micro-batches so far; the loop zeroes the gradients."""
        self._micro_batches = self._forwards = self._backwards = 0
        self._begun = False
        self._missed.reason = NOT_BEGUN
        if self._grad_variance is not None and self._grad_variance.measuring:
            self._grad_variance.drop()

    @outside_of_graphs
    def step(
        self,
        scaler: Optional['torch.amp.GradScaler'] = None,
        max_norm: Optional[float] = None,
    ) -> bool:
        """Measure, clip and step, if the update's micro-batches are done.

        Args:
            scaler: The loss scaler, if there is one; its ``update`` is left
                to the loop.
            max_norm: Norm to which the gradient is clipped. None for no
                clipping.

        Returns:
            Whether the update is done, so that gradients are to be zeroed.

        Raises:
            RuntimeError: There was no micro-batch, or it had another scaler.
        """
        if self._micro_batches == 0:
            raise RuntimeError(
                'AGVM: a step without a micro-batch: put forward and backward '
                'into "with agvm.micro_batch():"'
            )
        if scaler is not self._scaler:
            raise RuntimeError(
                'AGVM: step and micro_batch have different scalers: write '
                'agvm.micro_batch(scaler) and agvm.step(scaler)'
            )
        if self._micro_batches < self.accumulation:
            return False
        self._micro_batches = 0
        self.measure(None if max_norm is None else dict(max_norm=max_norm))
        if max_norm is not None:
            if scaler is not None:
                scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(
                [p for g in self.optimizer.param_groups for p in g['params']],
                max_norm,
            )
        with self.scaled_step():
            if scaler is None:
                self.optimizer.step()
            else:
                scaler.step(self.optimizer)
        return True

    # -- logging

    @property
    def noise_scale(self) -> Dict[str, float]:
        """Gradient noise scale of every module in images (McCandlish 2018).

        The batch size at which the gradient's noise is as large as its
        signal: 1 until it is measured, infinite while there is no signal.
        It is in samples until :meth:`set_batch` is called, and empty if
        ``images_per_rank`` is unknown.
        """
        images = images_per_sample(self.batch) if self.batch else 1
        if images is None:
            return {}
        samples = self.modulator.noise_scale
        return {
            module: images * samples[module] if module in samples else 1.0
            for module in self.modulator.modules
        }

    def quantities(self) -> Dict[str, Dict[str, float]]:
        """The values that are logged for every module, by quantity."""
        found = dict(
            variance=self.modulator.variance, lr_scale=self.modulator.lr_scale
        )
        if self.settings.estimator == 'pairs':
            found['noise_scale'] = self.noise_scale
        return found

    def scalars(self) -> Dict[str, float]:
        """All numbers to log, such as ``agvm_lr_scale/<module>``.

        Values that are not finite are left out, as JSON has no infinity.
        """
        found = {
            f'agvm_{quantity}/{module}': value
            for quantity, values in self.quantities().items()
            for module, value in values.items()
            if math.isfinite(value)
        }
        found['agvm/measured'] = self.modulator.measured
        found['agvm/skipped'] = self.modulator.skipped
        return found

    @property
    def attempts(self) -> int:
        """Measurements so far, whether they took effect or not."""
        return self.modulator.measured + self.modulator.skipped

    def set_batch(self, batch: Dict[str, Optional[int]]) -> None:
        """Set the composition of the batch, also if a checkpoint had another.

        Args:
            batch: ``ranks``, ``images_per_rank`` in a micro-batch, None if
                unknown, and ``accumulative_counts``, its micro-batches.
        """
        if self._grad_variance is not None:
            batch = dict(batch, samples=self._grad_variance.samples)
        old = images_per_sample(self.batch) if self.batch else None
        new = images_per_sample(batch)
        if old is not None and new is not None:
            self.modulator.resize_samples(new / old)
        growth = self.modulator.grad_growth
        if growth is not None and self.batch and self.batch != batch:
            growth.reset()  # another batch has other norms
            logger.info(
                'the batch has changed: the usual gradient norms of '
                'bound_by_grad_norm are measured anew'
            )
        self.batch = batch

    # -- the state in checkpoints

    def state_dict(self) -> Dict[str, Any]:
        """Plain numbers, strings, lists and dicts, by name of module."""
        return dict(
            self.modulator.state_dict(),
            update=self.update,
            batch=dict(self.batch),
        )

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load a state of :meth:`state_dict`, also one of other modules."""
        self.modulator.load_state_dict(state)
        self.update = state['update']
        self.abandon_update()
        present, self.batch = self.batch, dict(state['batch'])
        if present:
            self.set_batch(present)


def _restored(now: Any, given: Any, own: Any, mu: Optional[float]) -> Any:
    """A group's learning rate after a step.

    Args:
        now: The rate after the step.
        given: The rate that was set for the step, ``own * mu``.
        own: The rate before.
        mu: The group's multiplier. None for 1.
    """
    same = now is given or (isinstance(now, float) and now == given)
    if same:
        return own
    return now if mu is None else now / mu


def images_per_sample(batch: Dict[str, Optional[int]]) -> Optional[int]:
    """Images per sample, which is a rank's or a micro-batch's mean gradient.

    Args:
        batch: As :attr:`AGVM.batch`.

    Returns:
        None if ``images_per_rank`` is None.
    """
    images = batch['images_per_rank']
    ranks, micro_batches = (
        batch['ranks'] or 1,
        batch['accumulative_counts'] or 1,
    )
    # checkpoints of an older version have no samples
    samples = batch.get('samples') or (micro_batches if ranks == 1 else ranks)
    if images is None:
        return None
    return images * ranks * micro_batches // samples


def scale_of(
    scaler: Optional['torch.amp.GradScaler'], optimizer: torch.optim.Optimizer
) -> Optional[Tensor]:
    """The factor by which a loss scaler multiplies gradients, on their device.

    It is read by a public method, without a transfer to the CPU.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    device = optimizer.param_groups[0]['params'][0].device
    scale: Tensor = scaler.scale(torch.ones((), device=device))
    return scale


def _refuse_tensor_rates(optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError if reading a learning rate could take a transfer."""
    if any(
        isinstance(group['lr'], Tensor) for group in optimizer.param_groups
    ):
        raise ValueError(
            'AGVM: restart_at_lr_drop=True reads learning rates, and those of '
            f'this {type(optimizer).__name__} are tensors: give lr as a '
            'number, or set restart_at_lr_drop=False'
        )


def _group_modules(optimizer: torch.optim.Optimizer) -> List[Optional[str]]:
    """The module of every parameter group; None for a group without mu."""
    if not all('module' in group for group in optimizer.param_groups):
        raise ValueError(
            'the parameters are not grouped by module: set '
            "constructor='AGVMOptimWrapperConstructor' in optim_wrapper, or "
            'in a loop of your own make the groups with module_groups(model)'
        )
    if any(group.get('lr') is None for group in optimizer.param_groups):
        raise ValueError(
            f'{type(optimizer).__name__} has no learning rate to scale: set '
            'lr in optim_wrapper.optimizer'
        )
    return [group['module'] for group in optimizer.param_groups]
