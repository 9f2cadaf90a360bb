"""Layers that the necks of deformable convolutions share."""

from typing import Any, Dict, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional

Config = Dict[str, Any]
#: United-Perception's config of a convolution; None makes a plain one.
DEFORMABLE: Config = dict(type='DCN')
BATCH_NORM: Config = dict(type='BN')
RELU: Config = dict(type='ReLU')


class Conv3x3(nn.Module):
    """Optional activation, 3x3 convolution and optional normalization.

    Takes (N, ``in_channels``, H, W) to (N, ``out_channels``, ceil(H /
    ``stride``), ceil(W / ``stride``)), for any H and W. Like MMCV's deformable
    one, the convolution has no bias.

    Args:
        in_channels: Of the input.
        out_channels: Of the output.
        stride: Defaults to 1.
        conv_cfg: Of the convolution: ``dict(type='DCN')``, ``'DCNv2'``, or
            None for a plain one. Offsets begin at zero.
        norm_cfg: Defaults to None, for none.
        act_cfg: Likewise.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        conv_cfg: Optional[Config] = None,
        norm_cfg: Optional[Config] = None,
        act_cfg: Optional[Config] = None,
    ) -> None:
        super().__init__()
        # imported here, as the package must not need MMCV
        from mmcv.cnn import build_conv_layer

        if conv_cfg is not None:
            import mmcv.ops  # noqa: F401  registers deformable convolutions
        self.stride = stride
        self.act = act_layer(act_cfg)
        self.conv = build_conv_layer(
            conv_cfg,
            in_channels,
            out_channels,
            3,
            stride=stride,
            padding=1,
            bias=False,
        )
        self.norm = norm_layer(norm_cfg, out_channels)
        nn.init.xavier_uniform_(self.conv.weight)

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        """Convolve; ``plain`` ignores offsets and masks."""
        x = self.act(x)
        if plain:
            y = functional.conv2d(
                x, self.conv.weight, stride=self.stride, padding=1
            )
        elif hasattr(self.conv, 'conv_offset'):
            y = self._deformable(x)
        else:
            y = self.conv(x)
        output: Tensor = self.norm(y)
        return output

    def _deformable(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = x
        if min(height, width) < 3:
            # MMCV refuses maps smaller than the kernel; the padding is what
            # its kernel reads outside of a map anyway
            right, below = max(3 - width, 0), max(3 - height, 0)
            padded = functional.pad(x, (0, right, 0, below))
        # MMCV has no kernel for bfloat16, and half precision is too coarse
        # for positions in a large image: full precision is a choice of this
        # project
        with torch.autocast(x.device.type, enabled=False):
            # its kernels also need this layout
            y: Tensor = self.conv(
                padded.to(self.conv.weight.dtype).contiguous()
            )
        height, width = -(-height // self.stride), -(-width // self.stride)
        return y[..., :height, :width].to(x.dtype).contiguous()


def conv1x1(
    in_channels: int,
    out_channels: int,
    norm_cfg: Optional[Config],
    act_cfg: Optional[Config] = None,
) -> nn.Sequential:
    """1x1 convolution (with a bias if there is no norm), norm, activation."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=norm_cfg is None),
        norm_layer(norm_cfg, out_channels),
        act_layer(act_cfg),
    )


def norm_layer(cfg: Optional[Config], channels: int) -> nn.Module:
    """The layer of a ``norm_cfg``; the identity for None."""
    if cfg is None:
        return nn.Identity()
    from mmcv.cnn import build_norm_layer

    layer: nn.Module = build_norm_layer(cfg, channels)[1]
    return layer


def act_layer(cfg: Optional[Config]) -> nn.Module:
    """The layer of an ``act_cfg``; the identity for None."""
    if cfg is None:
        return nn.Identity()
    from mmcv.cnn import build_activation_layer

    layer: nn.Module = build_activation_layer(cfg)
    return layer


def to_size(
    x: Tensor, size: torch.Size, align_corners: bool = False
) -> Tensor:
    """``x`` resized bilinearly, unless it has the size already."""
    if x.shape[-2:] == size:
        return x
    return functional.interpolate(
        x, size=size, mode='bilinear', align_corners=align_corners
    )


def check_least(neck: str, name: str, value: Any, least: int) -> None:
    """Raise ValueError unless ``value`` is an integer of that size."""
    if not isinstance(value, int) or value < least:
        raise ValueError(
            f'{name}={value!r} of {neck} is too small or not an integer: '
            f'write {least} or more'
        )
