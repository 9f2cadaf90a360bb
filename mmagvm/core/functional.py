"""The equations of AGVM, as pure functions on tensors.

Equation numbers are those of the appendix of Xue et al., "Large-batch
Optimization for Dense Visual Predictions" (NeurIPS 2022).

========  ============  =====================================================
symbol    name          meaning
========  ============  =====================================================
G1, G2                  one module's gradient from the two halves of the batch
S, D      total,        G1 + G2 and G1 - G2, which is what an all-reduce of
          signed        the gradients and of their signed copies yields
phi       variance      1 - cos(G1, G2), in [0, 2] (Eq. 2 without the
                        learning rate, which cancels in Eq. 41)
mu        lr_scale      multiplier of a module's learning rate (Eq. 41, 42)
alpha     ema_decay     weight of the old mu in the moving average (Eq. 42)
v_t       exp_avg_sq    Adam's second moment, this update's gradient included
W         samples       ranks, or micro-batches, that are compared
r2, g2    local, mean   mean |g_r|^2 of the samples' gradients g_r, before they
                        are averaged, and |mean g_r|^2 after
========  ============  =====================================================
"""

from typing import List, Tuple, Union

import torch
from torch import Tensor

#: Length of a row, which a CPU's norm sums to seven digits.
ROW = 2**12
#: Number of elements from which on a tensor is summed by rows.
LARGE = 2**16


def sum_type(device: torch.device) -> torch.dtype:
    """The type in which sums of squares are kept on a device.

    float64 on a CPU and on CUDA. Other devices, such as Apple's and some
    NPUs, or their communication backends, may lack it. There sums are kept in
    float32, and in float64 once they are on the CPU.
    """
    if device.type in ('cpu', 'cuda'):
        return torch.float64
    return torch.float32


def squared_norms(tensors: List[Tensor]) -> Tensor:
    """The squared norms of tensors, (n,) in :func:`sum_type`.

    On CUDA the sums of many threads are added up in a tree, so the rounding
    error hardly grows with the size. A CPU adds one element after the other,
    which loses 1e-2 of 60 million float32 elements. There large tensors are
    summed by rows first, which loses 1e-8 and takes no longer.
    """
    parts = [_row_norms(t) for t in _at_least_float32(tensors)]
    norms = torch.stack(torch._foreach_norm(parts))
    return norms.to(sum_type(norms.device)).square()


def _row_norms(tensor: Tensor) -> Tensor:
    """A tensor, or the norms of its rows, which have the same norm."""
    if (
        tensor.numel() < LARGE
        or tensor.device.type != 'cpu'
        or tensor.dtype != torch.float32
    ):
        return tensor
    flat = tensor.reshape(-1)
    whole = flat.numel() // ROW * ROW
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return torch.cat([norms, rest[None]])


def half_batch_norms(total: List[Tensor], signed: List[Tensor]) -> Tensor:
    """Everything that :func:`split_variance` needs, in one pass.

    Args:
        total: S = G1 + G2 of one module, a tensor per parameter.
        signed: D = G1 - G2 of the same parameters, in the same shapes.

    Returns:
        ``(|S|^2, |D|^2, |S + D|^2, |S - D|^2)`` in :func:`sum_type`, on the
        device of the gradients. Norms of several parts of a module add up.
    """
    total, signed = _at_least_float32(total), _at_least_float32(signed)
    first = torch._foreach_add(total, signed)
    second = torch._foreach_sub(total, signed)
    return torch.stack(
        [
            squared_norms(part).sum()
            for part in (total, signed, list(first), list(second))
        ]
    )


def split_variance(norms: Tensor) -> Tensor:
    """phi = 1 - cos(G1, G2) of every module (Eq. 2).

    G1 and G2 are (S + D) / 2 and (S - D) / 2, so their product is
    (|S|^2 - |D|^2) / 4 and norms are enough.

    Args:
        norms: (h, 4), the rows of :func:`half_batch_norms`.

    Returns:
        (h,), in [0, 2]. NaN where a norm is not finite, or the cosine has no
        meaning: where a half has no gradient, or one a thousand times smaller
        than the other's.
    """
    total, signed, first, second = norms.unbind(-1)
    cosine = (total - signed) / (first * second).sqrt()
    # what is left of an empty half when S and D were rounded differently
    empty = torch.minimum(first, second) <= 1e-6 * torch.maximum(first, second)
    return (1 - cosine).clamp(0, 2).masked_fill(empty, torch.nan)


def pairs_variance(local: Tensor, mean: Tensor, samples: int) -> Tensor:
    """phi of every module as all pairs of samples estimate it.

    :func:`split_variance` estimates 1 - signal / (signal + 2 * noise / W).
    Signal is |true gradient|^2, and noise is the noise power of a sample, as
    :func:`pairs_noise` gives them. Written out it is
    2 (r2 - g2) / ((W - 2) g2 + r2).

    Args:
        local: (h,) r2.
        mean: (h,) g2.
        samples: W, 2 or more.

    Returns:
        (h,), in [0, 2]; NaN where there is no gradient.
    """
    phi = 2 * (local - mean) / ((samples - 2) * mean + local)
    return phi.clamp(0, 2)


def pairs_noise(
    local: Tensor, mean: Tensor, samples: int
) -> Tuple[Tensor, Tensor]:
    """Unbiased |true gradient|^2, and noise power of one sample.

    noise / signal is the simple noise scale, in samples (McCandlish et al.,
    "An Empirical Model of Large-Batch Training", 2018).

    Args:
        local: (h,) r2.
        mean: (h,) g2.
        samples: W, 2 or more.
    """
    signal = (samples * mean - local) / (samples - 1)
    noise = (local - mean) * samples / (samples - 1)
    return signal, noise


def adam_divisor(
    grads: List[Tensor], exp_avg_sqs: List[Tensor], beta2: float, eps: float
) -> List[Tensor]:
    """sqrt(v_t) + eps, by which Alg. 2 divides G1 and G2 before the cosine.

    v_t = beta2 * v_{t-1} + (1 - beta2) * g_t^2 as the optimizer is about to
    compute it. Its bias correction is one factor for all elements and cancels
    in the cosine.

    Args:
        grads: g_t, a tensor per parameter.
        exp_avg_sqs: v_{t-1} of the same parameters.
        beta2: Decay of the second moment.
        eps: Adam's epsilon.
    """
    divisor = torch._foreach_mul(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(divisor, grads, grads, 1 - beta2)
    torch._foreach_sqrt_(divisor)
    torch._foreach_add_(divisor, eps)
    return list(divisor)


def clip_divisor(norm: Tensor, max_norm: float) -> Tensor:
    """What ``torch.nn.utils.clip_grad_norm_`` divides gradients by.

    Args:
        norm: Of all gradients together.
        max_norm: As there.

    Returns:
        One number, 1 or more, on the norm's device.
    """
    return ((norm + 1e-6) / max_norm).clamp(min=1)


def modulate(
    lr_scale: Tensor,
    variance: Tensor,
    anchor: int,
    ema_decay: Union[float, Tensor],
    eps: float,
    ratio_range: Tuple[float, float],
    growth: Union[float, Tensor] = 1.0,
) -> Tensor:
    """The new mu of every module, from its old one and the measured phi.

    ratio_i = sqrt((phi_anchor + eps) / (phi_i + eps))           (Eq. 41)
    mu_i <- ema_decay * mu_i + (1 - ema_decay) * ratio_i         (Eq. 42)

    Args:
        lr_scale: (h,), mu before this measurement.
        variance: (h,), phi; NaN for a module that could not be measured,
            which keeps its mu. If that is the anchor, every module does.
        anchor: Index of the module that the others follow; its mu stays 1.
        ema_decay: alpha, in [0, 1), or (h,) of them.
        eps: Added to both variances, as the paper does for huge batches.
        ratio_range: Bounds of the ratio before averaging, around 1.
        growth: (h,), 1 or more. Divides the ratio, down to its lower bound.
            Not in the paper, where it is 1.

    Returns:
        (h,), mu after this measurement.
    """
    ratio = ((variance[anchor] + eps) / (variance + eps)).sqrt()
    ratio = ratio.clamp(*ratio_range)
    ratio = (ratio / growth).clamp(min=ratio_range[0])
    averaged = ema_decay * lr_scale + (1 - ema_decay) * ratio
    return torch.where(ratio.isnan(), lr_scale, averaged)


def _at_least_float32(tensors: List[Tensor]) -> List[Tensor]:
    # a norm of bfloat16 gradients would itself be a bfloat16: three digits
    return [t.float() if t.dtype.itemsize < 4 else t for t in tensors]
