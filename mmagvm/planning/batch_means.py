"""How well the means of correlated series are known, by batch means."""

from typing import Tuple

import numpy as np

#: Number of blocks of consecutive values. The spread of the blocks' averages
#: gives the intervals, since single values are correlated.
BLOCKS = 10
#: Fewer in a block would leave the blocks correlated, too.
LEAST_PER_BLOCK = 4
#: From this correlation of neighbouring blocks on, the mean is taken to
#: drift. Of 10 independent blocks it is larger once in a hundred times.
DRIFT = 0.5
DRAWS = 20_000


def draw_means(
    values: np.ndarray, blocks: int = BLOCKS, draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Plausible means of correlated series, by the method of batch means.

    The averages of blocks of consecutive values are nearly independent and
    normal. So their mean, over its standard error, has Student's distribution
    with ``blocks - 1`` degrees of freedom. Draws of it keep the correlation
    between series, so that functions of several means can be judged.

    Args:
        values: (n, h), h series; the first n % blocks values are left out.
        blocks: Number of blocks, 2 or more.
        draws: Number of draws.
        seed: Of the random numbers.

    Returns:
        (draws, h).
    """
    averages = block_means(values, blocks)
    mean = averages.mean(0)
    deviations = averages - mean
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((draws, blocks))
    # weights @ deviations has blocks - 1 times the covariance of a block
    normal = weights @ deviations / np.sqrt(blocks * (blocks - 1))
    chi = np.sqrt(rng.chisquare(blocks - 1, (draws, 1)) / (blocks - 1))
    return np.asarray(mean + normal / chi)


def block_means(values: np.ndarray, blocks: int) -> np.ndarray:
    """(blocks, h) averages of consecutive values."""
    rest = len(values) % blocks
    parts = np.reshape(values[rest:], (blocks, -1, values.shape[1]))
    return np.asarray(parts.mean(1))


def drift(values: np.ndarray, blocks: int = BLOCKS) -> np.ndarray:
    """(h,) correlation between neighbouring blocks of a series."""
    deviations = block_means(values, blocks)
    deviations = deviations - deviations.mean(0)
    total = (deviations**2).sum(0)
    product = (deviations[1:] * deviations[:-1]).sum(0)
    correlation: np.ndarray = np.divide(
        product, total, out=np.zeros_like(product), where=total > 0
    )
    return correlation


def interval(draws: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """95 % of the draws, along the first axis."""
    # no interpolation: next to an infinite one it would be NaN
    low, high = np.quantile(draws, [0.025, 0.975], axis=0, method='nearest')
    return low, high
