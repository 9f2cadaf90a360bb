"""Blocks of UniNet, and its modules between stages."""

from typing import Any, Dict, List, Optional, Sequence, Union

import torch
import torch.nn.functional as F  # noqa: N812
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from mmagvm.models.checkpointing import checkpointed


class _Block(nn.Module):
    """A residual block, which may keep only its input for backward."""

    def __init__(self, with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, channels, ceil(H / stride), ...)."""
        if self.with_cp and torch.is_grad_enabled():
            return checkpointed(self, self.compute, x)
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ConvBlock(_Block):
    """MBConv, whole or fused into one 3x3 convolution; see ``UniNet``.

    Args:
        in_channels: Before the block.
        channels: After it.
        expansion: How many times ``in_channels`` it has inside.
        stride: 1 or 2.
        fused: A 3x3 convolution for a 1x1 and a depthwise one.
        with_se: Squeeze-and-excitation before the last convolution.
        drop_path: The chance that an image skips the block.
        norm_cfg: Of its norms. Defaults to None, ``dict(type='BN')``.
        with_cp: See ``UniNet``.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        expansion: int,
        stride: int = 1,
        fused: bool = True,
        with_se: bool = True,
        drop_path: float = 0.0,
        norm_cfg: Optional[Dict[str, Any]] = None,
        with_cp: bool = False,
    ) -> None:
        super().__init__(with_cp)
        norm_cfg = norm_cfg or dict(type='BN')
        wide = in_channels * expansion
        layers: List[nn.Module] = []

        def convolve(before: int, kernel: int, stride: int, by: int) -> None:
            layers.extend(
                [
                    nn.Conv2d(
                        *(before, wide, kernel, stride, kernel // 2),
                        groups=by,
                        bias=False,
                    ),
                    build_norm(norm_cfg, wide),
                    nn.GELU(),
                ]
            )

        # with expansion 1, the 3x3 convolution is also the last one
        alone = fused and expansion == 1
        if fused and not alone:
            layers.append(build_norm(norm_cfg, in_channels))
            convolve(in_channels, 3, stride, 1)
        elif not fused:
            if expansion > 1 or stride > 1:
                layers.append(build_norm(norm_cfg, in_channels))
                convolve(in_channels, 1, 1, 1)
            convolve(wide, 3, stride, wide)
        if with_se:
            layers.append(SqueezeExcitation(wide))
        last = build_norm(norm_cfg, channels)
        layers += [
            nn.Conv2d(wide, channels, 3, stride, 1)
            if alone
            else nn.Conv2d(wide, channels, 1),
            last,
        ]
        if isinstance(last.weight, Tensor):  # None if not affine
            nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(*layers)
        self.shortcut = _shortcut(in_channels, channels, stride)
        self.drop_path = DropPath(drop_path)

    def compute(self, x: Tensor) -> Tensor:
        shortcut: Tensor = self.shortcut(x)
        changed: Tensor = self.drop_path(self.layers(x))
        return shortcut + changed


class SqueezeExcitation(nn.Module):
    """Scales channels by 0 to 1, depending on their means over all pixels.

    Between its two layers are a quarter of the channels, rounded to a
    multiple of 8 (United-Perception; Sense-X/UniNet).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        few = channels // 4
        rounded = max(8, (few + 4) // 8 * 8)
        if rounded < 0.9 * few:
            rounded += 8
        self.squeeze = nn.Conv2d(channels, rounded, 1)
        self.excite = nn.Conv2d(rounded, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        scale = F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x * F.hardsigmoid(self.excite(scale))


class TransformerBlock(_Block):
    """Position, attention and MLP; see ``UniNet``.

    Args:
        in_channels: Before the block.
        channels: After it. Where they differ, or with a stride, the block
            has no MLP.
        expansion: Of the MLP.
        stride: 1 or 2.
        head_dim: Channels of an attention head; divides ``in_channels``.
        window: The side of a window, in pixels of the output; 0 is all.
        layer_scale: Initial value of g.
        drop_path: The chance that an image skips attention, or the MLP.
        with_cp: See ``UniNet``.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        expansion: int,
        stride: int = 1,
        head_dim: int = 64,
        window: int = 0,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
        with_cp: bool = False,
    ) -> None:
        super().__init__(with_cp)
        self.changes = in_channels != channels or stride != 1
        self.position = nn.Conv2d(
            in_channels, in_channels, 3, 1, 1, groups=in_channels
        )
        self.attention_norm = nn.LayerNorm(in_channels)
        self.attention = Attention(in_channels, channels, head_dim, window)
        self.attention_scale = _scale(channels, layer_scale)
        if self.changes:
            self.pool = nn.MaxPool2d(3, stride, 1)
            self.shortcut = _shortcut(in_channels, channels, stride)
        else:
            self.mlp_norm = nn.LayerNorm(channels)
            self.mlp = nn.Sequential(
                nn.Linear(channels, channels * expansion),
                nn.GELU(),
                nn.Linear(channels * expansion, channels),
            )
            self.mlp_scale = _scale(channels, layer_scale)
            self.drop_path = DropPath(drop_path)
        _init_linear(self)

    def compute(self, x: Tensor) -> Tensor:
        x = x + self.position(x)
        if self.changes:
            normed = _to_maps(self.attention_norm(_to_pixels(x)))
            seen = self.attention(_to_pixels(self.pool(normed)))
            shortcut: Tensor = self.shortcut(x)
            return shortcut + _to_maps(self.attention_scale * seen)
        x = _to_pixels(x)
        seen = self.attention(self.attention_norm(x))
        x = x + self.drop_path(self.attention_scale * seen)
        mixed = self.mlp(self.mlp_norm(x))
        return _to_maps(x + self.drop_path(self.mlp_scale * mixed))


class Attention(nn.Module):
    """Attention of all pixels to all, or to those of their window.

    Args:
        in_channels: Before it; a multiple of ``head_dim``.
        channels: After it.
        head_dim: Channels of a head.
        window: The side of a window, in pixels; 0 is all pixels.
    """

    def __init__(
        self, in_channels: int, channels: int, head_dim: int, window: int = 0
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.window = window
        self.qkv = nn.Linear(in_channels, 3 * in_channels)
        self.out = nn.Linear(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, C) to (N, H, W, channels)."""
        height, width = x.shape[1:3]
        if self.window:
            # a map smaller than a window is padded to one, too
            down, right = (-side % self.window for side in (height, width))
            x = F.pad(x, (0, 0, 0, right, 0, down))
        padded = x.shape[1:3]
        windows = _split(x, self.window or padded)
        q, k, v = self.qkv(windows.flatten(1, 2)).chunk(3, -1)
        seen = self.out(attend(q, k, v, self.head_dim))
        merged = _merge(seen.unflatten(1, windows.shape[1:3]), padded, len(x))
        return merged[:, :height, :width]


def attend(q: Tensor, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
    """Softmax attention in heads of consecutive channels.

    Args:
        q: (N, L, C).
        k: (N, M, C).
        v: (N, M, C).
        head_dim: Channels of a head.

    Returns:
        As ``q``.
    """
    if not len(q):  # no image, as a RoI head may have none
        return v
    heads = (
        t.unflatten(-1, (-1, head_dim)).transpose(1, 2) for t in (q, k, v)
    )
    seen = F.scaled_dot_product_attention(*heads)
    return seen.transpose(1, 2).flatten(2)


class DSM(_Block):
    """A down-sampling module between stages (Sense-X/UniNet).

    The local one is ``conv1x1(BN(dwconv3x3(x))) + shortcut``. The
    local-global one takes that first term for queries, which attend to all
    pixels of x; queries, and keys and values, have a LayerNorm before. The
    shortcut is a 1x1 convolution, after a max-pool if there is a stride.

    Args:
        in_channels: Before the module.
        channels: After it.
        stride: 1 or 2.
        head_dim: Channels of a head of the local-global one; 0 for the local
            one.
        norm_cfg: Of its BN.
        with_cp: See ``UniNet``.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        head_dim: int,
        norm_cfg: Dict[str, Any],
        with_cp: bool = False,
    ) -> None:
        super().__init__(with_cp)
        self.head_dim = head_dim
        self.shortcut: nn.Module = nn.Conv2d(in_channels, channels, 1)
        if stride > 1:
            self.shortcut = _shortcut(in_channels, channels, stride)
        self.local = nn.Sequential(
            nn.Conv2d(
                *(in_channels, in_channels, 3, stride, 1), groups=in_channels
            ),
            build_norm(norm_cfg, in_channels),
            nn.Conv2d(in_channels, channels, 1),
        )
        if head_dim:
            self.query_norm = nn.LayerNorm(channels)
            self.norm = nn.LayerNorm(in_channels)
            self.kv = nn.Linear(in_channels, 2 * channels)
            self.out = nn.Linear(channels, channels)
            _init_linear(self)

    def compute(self, x: Tensor) -> Tensor:
        shortcut: Tensor = self.shortcut(x)
        local: Tensor = self.local(x)
        if self.head_dim:
            query = self.query_norm(_to_pixels(local))
            k, v = self.kv(self.norm(_to_pixels(x).flatten(1, 2))).chunk(2, -1)
            seen = self.out(attend(query.flatten(1, 2), k, v, self.head_dim))
            local = _to_maps(seen.unflatten(1, query.shape[1:3]))
        return shortcut + local


def _split(x: Tensor, side: Union[int, Sequence[int]]) -> Tensor:
    """Cut (N, H, W, C) into (N * windows, h, w, C)."""
    high, wide = (side, side) if isinstance(side, int) else side
    n, height, width, channels = x.shape
    x = x.view(n, height // high, high, width // wide, wide, channels)
    return x.transpose(2, 3).reshape(-1, high, wide, channels)


def _merge(windows: Tensor, size: Sequence[int], n: int) -> Tensor:
    """The inverse of :func:`_split`, for ``n`` images of ``size``."""
    high, wide, channels = windows.shape[1:]
    height, width = size
    x = windows.view(
        n, height // high, width // wide, high, wide, channels
    ).transpose(2, 3)
    return x.reshape(n, height, width, channels)


def _to_pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _to_maps(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module:
    if in_channels == channels and stride == 1:
        return nn.Identity()
    return nn.Sequential(
        nn.MaxPool2d(3, stride, 1), nn.Conv2d(in_channels, channels, 1)
    )


def _scale(channels: int, value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((channels,), float(value)))


def _init_linear(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


def build_norm(norm_cfg: Dict[str, Any], channels: int) -> nn.Module:
    """The norm layer of ``norm_cfg`` for that many channels."""
    norm: nn.Module = build_norm_layer(norm_cfg, channels)[1]
    return norm
