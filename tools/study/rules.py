"""Other rules for AGVM's multipliers, which the study compares.

Each answers a weakness of the paper's rule that the first part of the study
found: it only raises rates, it follows late when the learning rate falls, and
it takes a diverging module for one with little noise.
"""

from typing import Any, Dict

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmagvm.core.grad_variance import Measurement
from mmagvm.core.modulator import Modulator

#: The settings of AGVM that make a rule, by its name.
RULE_SETTINGS: Dict[str, Dict[str, Any]] = dict(
    mean_one={},  # but MeanOneHook
    forgetting=dict(restart_at_lr_drop=True),
    growth=dict(bound_by_grad_norm=True),
)


class MeanOne(Modulator):
    """Multipliers whose mean over all measured parameters is 1.

    So the anchor's falls when the others' rise, and the steps of all
    parameters are as long as without AGVM, on average.

    Args:
        wrapper: AGVM's optimizer wrapper, before its first update. This takes
            its modulator's place.
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
        self._followed = dict(self.lr_scale)
        self._sizes = dict.fromkeys(self.modules, 0)
        for group in wrapper.optimizer.param_groups:
            size = sum(p.numel() for p in group['params'] if p.requires_grad)
            if group['module'] in self._sizes:
                self._sizes[group['module']] += size

    def follow(
        self, measurement: Measurement, lr: float = 0.0
    ) -> Dict[str, float]:
        self.lr_scale = self._followed
        self._followed = super().follow(measurement, lr)
        total = sum(
            self._sizes[module] * scale
            for module, scale in self._followed.items()
        )
        mean = total / sum(self._sizes.values())
        return {m: scale / mean for m, scale in self._followed.items()}


@HOOKS.register_module()
class MeanOneHook(Hook):
    """Puts that rule in the place of AGVM's own."""

    priority = 'LOWEST'

    def before_train(self, runner: Runner) -> None:
        wrapper = runner.optim_wrapper
        wrapper.agvm.modulator = MeanOne(wrapper)
