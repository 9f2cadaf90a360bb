"""What follows from measured variances, for this batch and for others.

========  =====================================================================
symbol    meaning
========  =====================================================================
B         batch size of the run, in images
phi       measured variance, on average 1 - |G|^2 / (|G|^2 + 2 tr(Sigma) / B);
          Sigma is the covariance of one image's gradient
c         1 - phi, the cosine between the two halves of the batch
rho       tr(Sigma) / |G|^2 = B / 2 * (1 - c) / c, the noise scale in images
========  =====================================================================
"""

from typing import Optional, Tuple

import numpy as np


def noise_scale(cosine: np.ndarray, batch_size: int) -> np.ndarray:
    """rho in images; infinite where no signal shows (c <= 0)."""
    cosine = np.clip(cosine, 0, 1)
    with np.errstate(divide='ignore'):
        return np.asarray(batch_size / 2 * (1 - cosine) / cosine)


def variance_at(
    cosine: np.ndarray, batch_size: int, new_batch_size: int
) -> np.ndarray:
    """phi that is expected at another batch: 2 rho / (B' + 2 rho).

    A cosine below 0 counts as 0: no signal.
    """
    cosine = np.clip(cosine, 0, 1)
    noise = batch_size * (1 - cosine)
    return np.asarray(noise / (new_batch_size * cosine + noise))


def lr_scale_at(
    cosine: np.ndarray,
    batch_size: int,
    new_batch_size: int,
    anchor: int,
    eps: float,
    ratio_range: Tuple[float, float],
) -> np.ndarray:
    """mu that is expected at another batch (Eq. 41), (..., h).

    Args:
        cosine: (..., h), c at ``batch_size``.
        batch_size: B.
        new_batch_size: Where mu is wanted.
        anchor: Index of the module that the others follow.
        eps: As AGVM's.
        ratio_range: As AGVM's.
    """
    phi = variance_at(cosine, batch_size, new_batch_size) + eps
    ratio = np.sqrt(phi[..., anchor, None] / phi)
    return np.asarray(np.clip(ratio, *ratio_range))


def measurements_needed(
    cosine: float, low: float, count: int
) -> Optional[int]:
    """Measurements that bring the interval of a positive cosine above 0."""
    if cosine <= 0:
        return None
    return int(np.ceil(count * ((cosine - low) / cosine) ** 2))
