"""Gradient clipping for a part of the training."""

from typing import Any, Dict, Optional

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmagvm.recipes.registry import register


@register(HOOKS)
class ClipGradWindowHook(Hook):
    """Lets ``optim_wrapper.clip_grad`` act in a window of iterations only.

    ``optim_wrapper.clip_grad`` sets how gradients are clipped, as usual. The
    hook holds no state, so a resumed run clips as if it had never stopped.

    Args:
        begin: First iteration with clipped gradients.
        end: First iteration after the window. Defaults to None, for no end.

    Raises:
        ValueError: The window is empty, or ``clip_grad`` is not set.
    """

    def __init__(self, begin: int, end: Optional[int] = None) -> None:
        if begin < 0 or (end is not None and end <= begin):
            raise ValueError(
                f'begin={begin}, end={end} of ClipGradWindowHook is not a '
                'window: write 0 <= begin < end'
            )
        self.begin = begin
        self.end = end
        self._clip_grad: Optional[Dict[str, Any]] = None

    def before_train(self, runner: Runner) -> None:
        """Take over the setting of the wrapper."""
        wrapper = runner.optim_wrapper
        if hasattr(wrapper, 'optim_wrappers'):
            raise ValueError(
                'ClipGradWindowHook clips for one optimizer, but '
                f'optim_wrapper has several, {list(wrapper.optim_wrappers)}: '
                'remove the hook, or write a single optim_wrapper'
            )
        self._clip_grad = wrapper.clip_grad_kwargs
        if not self._clip_grad:
            raise ValueError(
                'ClipGradWindowHook needs a norm to clip to: set '
                'clip_grad=dict(max_norm=...) in optim_wrapper'
            )

        if self.begin >= runner.max_iters:
            runner.logger.warning(
                f'begin={self.begin} of ClipGradWindowHook is after the last '
                f'iteration, {runner.max_iters - 1}, so nothing is clipped: '
                'set a smaller begin'
            )

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Switch clipping on or off."""
        inside = self.begin <= runner.iter and (
            self.end is None or runner.iter < self.end
        )
        runner.optim_wrapper.clip_grad_kwargs = (
            self._clip_grad if inside else None
        )

    def after_train(self, runner: Runner) -> None:
        """Leave the wrapper as it was."""
        runner.optim_wrapper.clip_grad_kwargs = self._clip_grad
