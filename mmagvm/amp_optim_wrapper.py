"""AGVM in mixed precision."""

from typing import Any, Optional

import torch
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor

from .optim_wrapper import AGVMOptimWrapper


@OPTIM_WRAPPERS.register_module()
class AGVMAmpOptimWrapper(AGVMOptimWrapper, AmpOptimWrapper):
    """:class:`AGVMOptimWrapper` with MMEngine's mixed precision.

    An update that the loss scaler skips, because a gradient overflowed, is no
    update: it does not count, and as its measurement is not finite either, mu
    stays. All ranks skip alike, since all see the same averaged gradients.
    (With ``fused=True`` the optimizer skips by itself, on the device; such
    updates count, as asking the device each time would cost a transfer.)

    Args:
        kwargs: Of :class:`AGVMOptimWrapper` and of MMEngine's
            ``AmpOptimWrapper``, such as ``dtype='bfloat16'`` and
            ``loss_scale='dynamic'``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._stepped = False
        self.optimizer.register_step_post_hook(self._note_step)

    def step(self, **kwargs: Any) -> None:
        """Measure if it is time, then let the scaler step, or skip."""
        self._stepped = False
        super().step(**kwargs)

    def _has_stepped(self) -> bool:
        return self._stepped

    def _note_step(self, *_: Any) -> None:
        self._stepped = True

    def _loss_scale(self) -> Optional[Tensor]:
        # through a public method, and without a transfer
        device = self.optimizer.param_groups[0]['params'][0].device
        scale: Tensor = self.loss_scaler.scale(torch.ones((), device=device))
        return scale
