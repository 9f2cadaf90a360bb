"""Other rules for AGVM's multipliers, which the study compares.

Each answers a weakness of the paper's rule that the first part of the study
found: it only raises rates, it follows late when the learning rate falls, and
it takes a diverging module for one with little noise.
"""

from typing import Any, Dict

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmagvm.core.grad_variance import Measurement
from mmagvm.core.modulator import Modulator

#: A learning rate that is this much lower than at the last measurement fell.
FALL = 0.5


class Rule(Modulator):
    """A rule, in place of the modulator that a wrapper has.

    Args:
        wrapper: AGVM's optimizer wrapper, before its first update.
    """

    def __init__(self, wrapper: Any) -> None:
        replaced = wrapper.modulator
        super().__init__(
            replaced.modules,
            replaced.anchor,
            replaced.ema_decay,
            replaced.eps,
            replaced.ratio_range,
        )
        self.wrapper = wrapper


class MeanOne(Rule):
    """Multipliers whose mean over all measured parameters is 1.

    So the anchor's falls when the others' rise, and the steps of all
    parameters are as long as without AGVM, on average.
    """

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        self._followed = dict(self.lr_scale)
        self._sizes = dict.fromkeys(self.modules, 0)
        for group in wrapper.optimizer.param_groups:
            size = sum(p.numel() for p in group['params'] if p.requires_grad)
            if group['module'] in self._sizes:
                self._sizes[group['module']] += size

    def follow(self, measurement: Measurement) -> Dict[str, float]:
        self.lr_scale = self._followed
        self._followed = super().follow(measurement)
        total = sum(
            self._sizes[module] * scale
            for module, scale in self._followed.items()
        )
        mean = total / sum(self._sizes.values())
        return {m: scale / mean for m, scale in self._followed.items()}


class Forgetting(Rule):
    """A moving average that starts anew when the learning rate falls.

    From there on it is the mean of all ratios since, until that has the
    weights of the usual average.
    """

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        self._rate = 0.0
        self._fell = False
        self._since = 0

    def follow(self, measurement: Measurement) -> Dict[str, float]:
        rate = self.wrapper.optimizer.param_groups[0]['lr']
        if rate < FALL * self._rate:
            self._fell, self._since = True, 0
        self._rate = rate
        self._since += 1
        usual = self.ema_decay
        if self._fell:
            self.ema_decay = min(usual, 1 - 1 / self._since)
        try:
            return super().follow(measurement)
        finally:
            self.ema_decay = usual


class Bounded(Rule):
    """A ratio that is divided by how much a module's gradient has grown.

    That is, its norm over the root of the moving average of its square,
    where that is above 1. A module that begins to diverge has a gradient that
    grows and is alike in all samples: its variance alone asks for a higher
    learning rate.
    """

    def __init__(self, wrapper: Any) -> None:
        super().__init__(wrapper)
        self._average_norm = torch.full(
            (len(self.modules),), torch.nan, dtype=torch.float64
        )

    def follow(self, measurement: Measurement) -> Dict[str, float]:
        assert measurement.signal is not None, "needs estimator='pairs'"
        assert measurement.noise is not None
        samples = self.wrapper.agvm.accumulation  # on one rank
        norm = measurement.signal + measurement.noise / samples
        known = ~self._average_norm.isnan()
        self._average_norm = torch.where(
            known,
            self.ema_decay * self._average_norm + (1 - self.ema_decay) * norm,
            norm,
        )
        grown = (norm / self._average_norm).clamp(min=1)
        grown[self.modules.index(self.anchor)] = 1
        # Eq. 41: a phi that is x times as large is a ratio that is
        # sqrt(x) times as small
        return super().follow(
            measurement._replace(variance=measurement.variance * grown)
        )


RULES = dict(mean_one=MeanOne, forgetting=Forgetting, bounded=Bounded)


@HOOKS.register_module()
class StudyRuleHook(Hook):
    """Puts another rule in the place of AGVM's own.

    Args:
        rule: A name in ``RULES``.
    """

    priority = 'LOWEST'

    def __init__(self, rule: str) -> None:
        self.rule = RULES[rule]

    def before_train(self, runner: Runner) -> None:
        wrapper = runner.optim_wrapper
        wrapper.agvm.modulator = self.rule(wrapper)
