"""What follows from a measurement: phi and mu of every module, over time."""

import logging
from typing import Any, Dict, List, Sequence, Tuple

import torch
from mmengine.logging import print_log
from torch import Tensor

from .functional import modulate, split_variance

#: Measurements kept in a checkpoint, the newest ones.
HISTORY_LENGTH = 10_000


class Modulator:
    """Keeps every module's multiplier, and how it came about.

    Args:
        modules: Names of the modules.
        anchor: The one that the others follow.
        ema_decay: alpha of Eq. 42.
        eps: Added to both variances of Eq. 41.
        ratio_range: Bounds of the ratio of Eq. 41.

    Attributes:
        lr_scale (dict): mu by module.
        variance (dict): The last phi by module; 1 until it is measured.
        measured (int): Measurements that took effect.
        skipped (int): Measurements dropped for being NaN or infinite.
        history (list): ``(update, phis)`` of the newest measurements, phis in
            the order of ``modules``, NaN for one that had no gradient.
    """

    def __init__(
        self,
        modules: Sequence[str],
        anchor: str,
        ema_decay: float,
        eps: float,
        ratio_range: Tuple[float, float],
    ) -> None:
        self.modules = list(modules)
        self.anchor = anchor
        self.ema_decay = ema_decay
        self.eps = eps
        self.ratio_range = ratio_range
        self.lr_scale = dict.fromkeys(self.modules, 1.0)
        self.variance = dict.fromkeys(self.modules, 1.0)
        self.measured = 0
        self.skipped = 0
        self.history: List[Tuple[int, List[float]]] = []

    def update(self, update: int, norms: Tensor) -> None:
        """Turn one measurement into new multipliers.

        Args:
            update: When it was taken.
            norms: (h, 4) on the CPU, from
                :func:`~mmagvm.grad_variance.module_norms`. If any is not
                finite, all multipliers stay as they are.
        """
        if not norms.isfinite().all():
            self.skipped += 1
            _warn(
                f'update {update} has gradients that are NaN or infinite; '
                f'lr_scale stays as it was ({self.skipped} measurements '
                'skipped so far)'
            )
            return
        phis = split_variance(norms)
        scales = modulate(
            torch.tensor(list(self.lr_scale.values()), dtype=torch.float64),
            phis,
            self.modules.index(self.anchor),
            self.ema_decay,
            self.eps,
            self.ratio_range,
        )
        self.lr_scale = dict(zip(self.modules, scales.tolist()))
        for module, phi in zip(self.modules, phis):
            if not phi.isnan():
                self.variance[module] = phi.item()
        self.measured += 1
        self.history.append((update, phis.tolist()))
        del self.history[:-HISTORY_LENGTH]

    def state_dict(self) -> Dict[str, Any]:
        """Plain numbers, strings, lists and dicts, by name of module."""
        return dict(
            modules=list(self.modules),
            lr_scale=dict(self.lr_scale),
            variance=dict(self.variance),
            measured=self.measured,
            skipped=self.skipped,
            history=[[update, list(phis)] for update, phis in self.history],
        )

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Load a state, which may be of other modules: those start at 1."""
        missing = [m for m in self.modules if m not in state['modules']]
        unknown = [m for m in state['modules'] if m not in self.modules]
        if missing or unknown:
            _warn(
                f'the checkpoint has other modules: {missing} start with '
                f'lr_scale 1, {unknown} are dropped'
            )
        for module in self.modules:
            self.lr_scale[module] = state['lr_scale'].get(module, 1.0)
            self.variance[module] = state['variance'].get(module, 1.0)
        self.measured = state['measured']
        self.skipped = state['skipped']
        self.history = []
        for update, phis in state['history']:
            phi_of = dict(zip(state['modules'], phis))
            phis = [phi_of.get(m, float('nan')) for m in self.modules]
            self.history.append((update, phis))


def _warn(message: str) -> None:
    print_log(f'AGVM: {message}', logger='current', level=logging.WARNING)
