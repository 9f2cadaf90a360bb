"""Medians and their intervals."""

import math
from typing import Dict, Sequence, Union

import numpy as np

#: One value of each repetition.
Values = Union[Sequence[float], np.ndarray]


def summary(values: Values) -> Dict[str, float]:
    """Median, quartiles and the 95 % interval of the median.

    The interval is between two of the values, by order statistics. It assumes
    nothing about the distribution.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    outside = 0  # values left out at either end
    below = 1.0  # of 2^n cases, those with the median among these values
    while 2 * below <= 0.05 * 2.0**n:
        outside += 1
        below += math.comb(n, outside)
    outside = max(outside - 1, 0)
    return dict(
        median=float(np.median(ordered)),
        q1=float(np.quantile(ordered, 0.25)),
        q3=float(np.quantile(ordered, 0.75)),
        low95=float(ordered[outside]),
        high95=float(ordered[n - 1 - outside]),
        n=n,
    )


def ratio_summary(
    numerators: Values, denominators: Values
) -> Dict[str, float]:
    """:func:`summary` of the ratios within each repetition.

    Whatever slows down a whole repetition, such as another program, cancels.
    """
    return summary(np.divide(numerators, denominators).tolist())
