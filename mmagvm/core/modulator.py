"""What follows from a measurement: phi and mu of every module, over time."""

import logging
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from mmagvm.core.functional import modulate
from mmagvm.core.grad_growth import GradGrowth
from mmagvm.core.grad_variance import Measurement
from mmagvm.core.lr_drop import LRDrop
from mmagvm.core.settings import ADDITIONS

logger = logging.getLogger('mmagvm')

#: Measurements kept in a checkpoint, the newest ones.
HISTORY_LENGTH = 10_000


class Modulator:
    """Keeps every module's multiplier and the measurements behind it.

    Args:
        modules: Names of the modules.
        anchor: The one that the others follow.
        ema_decay: alpha of Eq. 42.
        eps: Added to both variances of Eq. 41.
        ratio_range: Bounds of the ratio of Eq. 41.
        restart_at_lr_drop: As in :class:`~mmagvm.core.Settings`.
        bound_by_grad_norm: As there.

    Attributes:
        lr_scale (dict): mu by module.
        variance (dict): The last phi by module; 1 until it is measured.
        measured (int): Measurements that took effect.
        skipped (int): Measurements dropped for being NaN or infinite.
        noise_scale (dict): Noise power of one sample's gradient over its
            signal's, both averaged over measurements, by module: the batch,
            in samples, at which noise and signal are equal. Empty unless the
            estimator gives them; infinite while there is no signal.
        history (list): ``(update, phis)`` of the newest measurements, phis in
            the order of ``modules``, NaN for one that had no gradient.
        lr_drop (LRDrop): None unless ``restart_at_lr_drop``.
        grad_growth (GradGrowth): None unless ``bound_by_grad_norm``.
    """

    def __init__(
        self,
        modules: Sequence[str],
        anchor: str,
        ema_decay: float,
        eps: float,
        ratio_range: Tuple[float, float],
        restart_at_lr_drop: bool = False,
        bound_by_grad_norm: bool = False,
    ) -> None:
        self.modules = list(modules)
        self.anchor = anchor
        self.ema_decay = ema_decay
        self.eps = eps
        self.ratio_range = ratio_range
        self.lr_drop = LRDrop(self.modules) if restart_at_lr_drop else None
        self.grad_growth = (
            GradGrowth(self.modules) if bound_by_grad_norm else None
        )
        self.lr_scale = dict.fromkeys(self.modules, 1.0)
        self.variance = dict.fromkeys(self.modules, 1.0)
        self.measured = 0
        self.skipped = 0
        self.history: List[Tuple[int, List[float]]] = []
        self._signal: Dict[str, float] = {}
        self._noise: Dict[str, float] = {}

    @property
    def noise_scale(self) -> Dict[str, float]:
        return {
            module: noise / signal if signal > 0 else float('inf')
            for (module, signal), noise in zip(
                self._signal.items(), self._noise.values()
            )
        }

    def update(
        self, update: int, measurement: Measurement, lr: float = 0.0
    ) -> None:
        """Turn one measurement into new multipliers.

        Args:
            update: Index of the update that was measured.
            measurement: If it is not finite, everything stays as it is.
            lr: The schedule's learning rate, which ``restart_at_lr_drop``
                needs.
        """
        if not measurement.finite:
            self.skipped += 1
            logger.warning(
                f'update {update} has gradients that are NaN or infinite; '
                f'lr_scale stays as it was ({self.skipped} measurements '
                'skipped so far)'
            )
            return
        phis = measurement.variance
        self.lr_scale = self.follow(measurement, lr)
        for module, phi in zip(self.modules, phis):
            if not phi.isnan():
                self.variance[module] = phi.item()
        self._average(self._signal, phis, measurement.signal)
        self._average(self._noise, phis, measurement.noise)
        self.measured += not phis[self.modules.index(self.anchor)].isnan()
        self.history.append((update, phis.tolist()))
        del self.history[:-HISTORY_LENGTH]

    def follow(
        self, measurement: Measurement, lr: float = 0.0
    ) -> Dict[str, float]:
        """The new multipliers by module, Eq. 41 and 42."""
        anchor = self.modules.index(self.anchor)
        phis, norm = measurement.variance, measurement.norm
        if phis[anchor].isnan():
            return self.lr_scale
        ema_decay: Union[float, Tensor] = self.ema_decay
        growth: Union[float, Tensor] = 1.0
        if self.lr_drop is not None:
            ema_decay = self.lr_drop.ema_decay(
                self.ema_decay, lr, ~phis.isnan()
            )
        if self.grad_growth is not None:
            assert norm is not None
            growth = self.grad_growth.follow(norm, self.ema_decay, anchor)
        scales = modulate(
            torch.tensor(list(self.lr_scale.values()), dtype=torch.float64),
            phis,
            anchor,
            ema_decay,
            self.eps,
            self.ratio_range,
            growth,
        )
        return dict(zip(self.modules, scales.tolist()))

    def _average(
        self, averages: Dict[str, float], phis: Tensor, new: Optional[Tensor]
    ) -> None:
        """Move averages of the modules that were measured."""
        if new is None:
            return
        for module, phi, value in zip(self.modules, phis, new.tolist()):
            if not phi.isnan():
                old = averages.get(module, value)
                averages[module] = (
                    self.ema_decay * old + (1 - self.ema_decay) * value
                )

    def resize_samples(self, factor: float) -> None:
        """Adapt to samples that have ``factor`` times as many images."""
        for module in self._noise:
            self._noise[module] /= factor

    def state_dict(self) -> Dict[str, Any]:
        """Plain numbers, strings, lists and dicts, by name of module."""
        own = {name: own.state_dict() for name, own in self._own().items()}
        return dict(
            own,
            modules=list(self.modules),
            lr_scale=dict(self.lr_scale),
            variance=dict(self.variance),
            measured=self.measured,
            skipped=self.skipped,
            signal=dict(self._signal),
            noise=dict(self._noise),
            history=[[update, list(phis)] for update, phis in self.history],
        )

    def _own(self) -> Dict[str, Any]:
        """The parts that have a state of their own, by name of setting."""
        parts = zip(ADDITIONS, (self.lr_drop, self.grad_growth))
        return {name: part for name, part in parts if part is not None}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load a state; modules that it does not have start at 1."""
        own = self._own()
        for name in ADDITIONS:
            if name in own and name in state:
                own[name].load_state_dict(state[name])
            elif name in own:
                own[name].reset()
                logger.info(
                    f'the checkpoint is of a run without {name}: it starts '
                    'at the next measurement'
                )
            elif name in state:
                logger.info(
                    f'the checkpoint is of a run with {name}, which this run '
                    'does not use'
                )
        missing = [m for m in self.modules if m not in state['modules']]
        unknown = [m for m in state['modules'] if m not in self.modules]
        if missing or unknown:
            logger.warning(
                f'the checkpoint has other modules: {missing} start with '
                f'lr_scale 1, {unknown} are dropped'
            )
        for module in self.modules:
            self.lr_scale[module] = state['lr_scale'].get(module, 1.0)
            self.variance[module] = state['variance'].get(module, 1.0)
        self.lr_scale[self.anchor] = 1.0  # it may be another anchor now
        self.measured = state['measured']
        self.skipped = state['skipped']
        for name, own in (('signal', self._signal), ('noise', self._noise)):
            own.update(
                (module, value)
                for module, value in state[name].items()
                if module in self.modules
            )
        self.history = []
        for update, phis in state['history']:
            phi_of = dict(zip(state['modules'], phis))
            phis = [phi_of.get(m, float('nan')) for m in self.modules]
            self.history.append((update, phis))
