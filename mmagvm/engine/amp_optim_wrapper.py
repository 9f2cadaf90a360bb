"""AGVM in mixed precision."""

from typing import Any, Optional

from mmengine.optim import AmpOptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import Tensor

from mmagvm.core.agvm import scale_of
from mmagvm.engine.optim_wrapper import AGVMOptimWrapper
from mmagvm.recipes.registry import register


@register(OPTIM_WRAPPERS)
class AGVMAmpOptimWrapper(AGVMOptimWrapper, AmpOptimWrapper):
    """:class:`AGVMOptimWrapper` with MMEngine's mixed precision.

    An update that the loss scaler skips, because a gradient overflowed, does
    not count. Its measurement is not finite either, so mu stays. All ranks
    skip alike, since all have the same averaged gradients. (With
    ``fused=True`` the optimizer itself skips, on the device. Such updates
    count, as asking the device each time would cost a transfer.)

    Args:
        kwargs: Arguments of :class:`AGVMOptimWrapper` and of MMEngine's
            ``AmpOptimWrapper``, such as ``dtype='bfloat16'`` and
            ``loss_scale='dynamic'``.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def _loss_scale(self) -> Optional[Tensor]:
        return scale_of(self.loss_scaler, self.optimizer)
