"""AGVM's settings, and their checks."""

import math
from dataclasses import dataclass
from typing import Any, Optional, Tuple

from mmagvm.core.grad_variance import COMM_HOOKS, ESTIMATORS

#: Settings that add to the paper's rule.
ADDITIONS = ('restart_at_lr_drop', 'bound_by_grad_norm')


@dataclass(frozen=True)
class Settings:
    """When and how AGVM measures, and whether it modulates.

    Counts are in updates of the optimizer, which with accumulation are fewer
    than iterations.

    Args:
        interval: tau, updates between two measurements.
        ema_decay: alpha, weight of the old mu, in [0, 1).
        begin: First update that is measured; until then mu is 1.
        end: Measuring stops before this update, and mu stays as it is. None
            for never.
        anchor: The module that the others follow.
        estimator: How phi is estimated. 'split', the paper's, compares one
            half of the ranks (or micro-batches) with the other. 'pairs'
            compares each with every other, from norms alone.
        eps: Added to both variances of the ratio.
        ratio_range: Bounds of the ratio, around 1.
        comm_hook: Type in which ranks exchange gradients, 'fp16' or 'bf16',
            by torch's communication hooks of that name. None leaves the model
            as it is. float16 has no numbers below 6e-8: smaller gradients
            need 'bf16' or a loss scaler. If a module loses much of its
            gradient, a warning names it.
        modulate: False measures and logs everything, lr_scale too, but steps
            with the plain learning rate.
        restart_at_lr_drop: True restarts the moving average of mu when the
            learning rate, the highest of all groups, falls below half of its
            highest value since the last drop. Then mu is the mean of the
            ratios since, until the usual average takes over. It is meant for
            step schedules. Not in the paper.
        bound_by_grad_norm: True divides the ratio of a module by the growth
            of its gradient: its norm over its usual norm, relative to the
            same of the anchor, and at least 1. The usual norm is the root of
            a moving average of squared norms. It needs the estimator 'pairs'.
            Not in the paper.

    Raises:
        ValueError: A setting is wrong; the message says what to write instead.
    """

    interval: int = 10
    ema_decay: float = 0.97
    begin: int = 0
    end: Optional[int] = None
    anchor: str = 'backbone'
    estimator: str = 'pairs'
    eps: float = 1e-6
    ratio_range: Tuple[float, float] = (0.1, 10.0)
    comm_hook: Optional[str] = None
    modulate: bool = True
    restart_at_lr_drop: bool = False
    bound_by_grad_norm: bool = False

    def __post_init__(self) -> None:
        for name, holds, expected in (
            (
                'interval',
                _is_count(self.interval) and self.interval >= 1,
                'a number of updates: write 1 or more, such as 10',
            ),
            (
                'ema_decay',
                _is_number(self.ema_decay) and 0 <= self.ema_decay < 1,
                'the weight of the old lr_scale: write a number from 0 to '
                'below 1, such as 0.97',
            ),
            (
                'begin',
                _is_count(self.begin) and self.begin >= 0,
                'an update: write 0 or more',
            ),
            (
                'end',
                self.end is None
                or _is_count(self.end)
                and self.end > self.begin,
                f'an update after begin={self.begin}: write a larger one, or '
                'None to measure until training ends',
            ),
            (
                'estimator',
                self.estimator in list(ESTIMATORS),
                "an estimator: write 'split' or 'pairs'",
            ),
            (
                'comm_hook',
                self.comm_hook in list(COMM_HOOKS),
                "a way to send gradients: write 'fp16', 'bf16' or None",
            ),
            (
                'eps',
                _is_number(self.eps) and self.eps >= 0,
                'a small number: write 0 or more, such as 1e-6',
            ),
            (
                'ratio_range',
                isinstance(self.ratio_range, (list, tuple))
                and len(self.ratio_range) == 2
                and all(map(_is_number, self.ratio_range))
                and 0 < self.ratio_range[0] <= 1 <= self.ratio_range[1],
                'a range (low, high) around 1: write one such as (0.1, 10.0)',
            ),
            *(
                (
                    name,
                    isinstance(getattr(self, name), bool),
                    'a switch: write True or False',
                )
                for name in ('modulate', *ADDITIONS)
            ),
            *(
                (
                    name,
                    not getattr(self, name) or self.ema_decay != 0,
                    'possible with ema_decay=0, which keeps no average: '
                    f'write a higher ema_decay, or {name}=False',
                )
                for name in ADDITIONS
            ),
            (
                'bound_by_grad_norm',
                not self.bound_by_grad_norm or self.estimator == 'pairs',
                f'possible with estimator={self.estimator!r}, which gives no '
                "norms: write estimator='pairs', or bound_by_grad_norm=False",
            ),
        ):
            if not holds:
                raise ValueError(
                    f'AGVM: {name}={getattr(self, name)!r} is not {expected}'
                )

    def is_due(self, update: int) -> bool:
        """Whether an update is to be measured.

        Args:
            update: Its index, from 0.
        """
        return (
            update >= self.begin
            and (self.end is None or update < self.end)
            and (update - self.begin) % self.interval == 0
        )

    def due_between(self, first: int, last: int) -> range:
        """The updates of a span that are to be measured.

        Args:
            first: First update of the span.
            last: The update after the span.
        """
        first = max(first, self.begin)
        first += -(first - self.begin) % self.interval
        last = last if self.end is None else min(last, self.end)
        return range(first, last, self.interval)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )
