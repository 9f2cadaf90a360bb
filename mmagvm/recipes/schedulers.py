"""Schedules that MMEngine lacks."""

from typing import Any, List

from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler
from mmengine.registry import PARAM_SCHEDULERS

from mmagvm.recipes.registry import register


@register(PARAM_SCHEDULERS)
class ExponentialWarmupLR(_ParamScheduler):
    """Grows the learning rate by the same factor at each step.

    From ``start_factor`` at ``begin`` to 1 at the last step before ``end``,
    as in LinearLR:

        factor_t = start_factor ** (1 - (t - begin) / (end - begin - 1))

    Args:
        optimizer: An optimizer or an optimizer wrapper.
        start_factor: Of the learning rate, in (0, 1]. Defaults to 0.001.
        begin: First step. Defaults to 0.
        end: First step after the warm-up.
        last_step: As in MMEngine. Defaults to -1.
        by_epoch: Whether steps are epochs. Defaults to True, as in MMEngine.
            With ``convert_to_iter_based=True`` the rate grows within epochs.
        verbose: Whether to print every rate. Defaults to False.

    Raises:
        ValueError: ``start_factor`` is not in (0, 1], or ``end`` is missing.
    """

    def __init__(
        self,
        optimizer: Any,
        start_factor: float = 0.001,
        begin: int = 0,
        end: int = INF,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        if not 0 < start_factor <= 1:
            raise ValueError(
                f'start_factor={start_factor} of ExponentialWarmupLR is out '
                'of range: write a number above 0 and at most 1'
            )
        if end == INF:
            raise ValueError('ExponentialWarmupLR has no end: set end')
        self.start_factor = start_factor
        self.total_iters = end - begin - 1
        super().__init__(
            optimizer,
            param_name='lr',
            begin=begin,
            end=end,
            last_step=last_step,
            by_epoch=by_epoch,
            verbose=verbose,
        )

    @classmethod
    def build_iter_from_epoch(
        cls,
        optimizer: Any,
        begin: int = 0,
        end: int = INF,
        by_epoch: bool = True,
        epoch_length: int = 1,
        **kwargs: Any,
    ) -> 'ExponentialWarmupLR':
        """The same in iterations, from ``begin`` and ``end`` in epochs."""
        assert by_epoch, 'only a schedule of epochs can be converted'
        return cls(
            optimizer,
            begin=int(begin * epoch_length),
            end=end if end == INF else int(end * epoch_length),
            by_epoch=False,
            **kwargs,
        )

    def _get_value(self) -> List[float]:
        """The next rates, computed from the current ones."""
        if self.last_step == 0:
            # a warm-up of one step starts at the full rate
            factor = self.start_factor if self.total_iters > 0 else 1.0
        else:
            factor = self.start_factor ** (-1 / self.total_iters)
        return [
            group[self.param_name] * factor
            for group in self.optimizer.param_groups
        ]
