"""The transformer block of UniNet, which the RoI heads of HTC-X have too."""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention over a map, or within windows of it.

    Args:
        in_channels: Of the input, and of all heads together.
        out_channels: Of the output.
        head_dim: Channels of a head, a divisor of ``in_channels``.
        window: Side of square windows, in cells. None for the whole map.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        head_dim: int,
        window: Optional[int] = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.window = head_dim, window
        self.qkv = nn.Linear(in_channels, 3 * in_channels)
        self.proj = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) to (N, H, W, ``out_channels``).

        A map is padded with zeros to whole windows; what is padded is not
        masked, as in United-Perception.
        """
        count, height, width, _ = x.shape
        if self.window is None:
            x = self._attend(x.flatten(1, 2)).unflatten(1, (height, width))
        else:
            windows, padded = to_windows(x, self.window)
            mixed = self._attend(windows)
            x = from_windows(mixed, self.window, padded)
            x = x[:, :height, :width]
        output: Tensor = self.proj(x)
        return output

    def _attend(self, x: Tensor) -> Tensor:
        """(N, tokens, C) to the same."""
        count, tokens, channels = x.shape
        heads = channels // self.head_dim
        qkv = self.qkv(x).view(count, tokens, 3, heads, self.head_dim)
        # each (N, heads, tokens, channels of a head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # no RoI: a fused kernel need not take an empty batch, and v suffices
        # to give all of qkv a gradient
        mixed = F.scaled_dot_product_attention(q, k, v) if count else v
        return mixed.transpose(1, 2).flatten(2)


def to_windows(x: Tensor, side: int) -> Tuple[Tensor, Tuple[int, int]]:
    """Cut a map into windows.

    Args:
        x: (N, H, W, C).
        side: Of a window, in cells.

    Returns:
        (N x windows, side x side, C), and the padded H and W.
    """
    count, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    height, width = x.shape[1:3]
    x = x.view(count, height // side, side, width // side, side, channels)
    windows = x.transpose(2, 3).reshape(-1, side * side, channels)
    return windows, (height, width)


def from_windows(windows: Tensor, side: int, size: Tuple[int, int]) -> Tensor:
    """What :func:`to_windows` cut, padding included, (N, *size, C)."""
    rows, columns = size[0] // side, size[1] // side
    x = windows.view(-1, rows, columns, side, side, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, *size, windows.shape[-1])


class DropPath(nn.Module):
    """Leaves out the branch of a residual block, image by image.

    Args:
        probability: Of leaving it out, in training; what stays is divided
            by the probability of staying.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) to the same."""
        if not self.training or self.probability == 0:
            return x
        stays = 1 - self.probability
        shape = (len(x), *[1] * (x.ndim - 1))
        return x * (x.new_empty(shape).bernoulli_(stays) / stays)


class TransformerBlock(nn.Module):
    """With g1 and g2 a gain per channel, and drop path on both branches,

        x <- x + dwconv3x3(x)
        x <- x + g1 * attention(LN(x))
        x <- x + g2 * MLP(LN(x))

    Source: UniNet (Liu et al., ECCV 2022), as United-Perception has it.

    Args:
        channels: Of the input and the output.
        head_dim: Channels of an attention head, a divisor of ``channels``.
        mlp_ratio: Hidden channels of the MLP, in ``channels``.
        layer_scale: Initial value of g1 and g2.
        window: As of :class:`Attention`.
        drop_path: As of :class:`DropPath`.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int,
        mlp_ratio: float,
        layer_scale: float,
        window: Optional[int] = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.dwconv = nn.Conv2d(
            channels, channels, 3, padding=1, groups=channels
        )
        self.norm1 = nn.LayerNorm(channels)
        self.attention = Attention(channels, channels, head_dim, window)
        self.gain1 = nn.Parameter(torch.full((channels,), float(layer_scale)))
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, channels)
        )
        self.gain2 = nn.Parameter(torch.full((channels,), float(layer_scale)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        x = (x + self.dwconv(x)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.gain1 * self.attention(self.norm1(x)))
        x = x + self.drop_path(self.gain2 * self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)
