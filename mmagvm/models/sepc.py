"""Convolution over a pyramid as over a third axis (SEPC)."""

from typing import List, Optional, Sequence, Tuple

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmagvm.models.pyramid import (
    BATCH_NORM,
    DEFORMABLE,
    RELU,
    Config,
    Conv3x3,
    act_layer,
    check_least,
    norm_layer,
    to_size,
)
from mmagvm.recipes.registry import register


@register(MODELS)
class SEPC(BaseModule):
    """Scale-equalizing pyramid convolution (Wang et al., "Scale-Equalizing
    Pyramid Convolution for Object Detection", CVPR 2020).

    ``num_convs`` of :class:`PConv`, one after another. All levels share the
    kernels, so their number is free. Defaults are those of
    United-Perception (``mb15`` at commit 2bd6d9f): all convolutions are
    deformable and one pyramid comes out. The pair of further convolutions,
    for classification and localization, is left out as there.

    Kernels start from a normal distribution of standard deviation 0.01,
    offsets at zero.

    Args:
        in_channels: Of every level, one number.
        out_channels: Likewise.
        num_convs: Defaults to 4.
        plain_first_level: The first level's outputs use the same kernels
            without offsets, as in SEPC's own code. Defaults to False.
        conv_cfg: Of 3x3 convolutions: ``dict(type='DCN')``, the default,
            ``dict(type='DCNv2')``, or None for plain ones.
        norm_cfg: Defaults to ``dict(type='BN')``.
        act_cfg: Defaults to ``dict(type='ReLU')``.
        init_cfg: Of MMEngine, instead of the above. Note that
            ``layer='Conv2d'`` includes offsets.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_convs: int = 4,
        plain_first_level: bool = False,
        conv_cfg: Optional[Config] = DEFORMABLE,
        norm_cfg: Config = BATCH_NORM,
        act_cfg: Optional[Config] = RELU,
        init_cfg: Optional[Config] = None,
    ) -> None:
        super().__init__(init_cfg)
        if not isinstance(in_channels, int):
            raise ValueError(
                f'in_channels={in_channels!r} of SEPC is not an integer: '
                'write one number, as all levels share their kernels'
            )
        check_least('SEPC', 'num_convs', num_convs, 1)
        self.convs = nn.ModuleList(
            PConv(
                out_channels if place else in_channels,
                out_channels,
                plain_first_level,
                conv_cfg,
                norm_cfg,
                act_cfg,
            )
            for place in range(num_convs)
        )

    def forward(self, inputs: Sequence[Tensor]) -> Tuple[Tensor, ...]:
        """Convolve a pyramid.

        Args:
            inputs: (N, ``in_channels``, H_i, W_i), from the finest; the sides
                of a level are half of those before, rounded up.

        Returns:
            As many of (N, ``out_channels``, H_i, W_i).
        """
        levels = list(inputs)
        for conv in self.convs:
            levels = conv(levels)
        return tuple(levels)


class PConv(nn.Module):
    """Pyramid convolution: a kernel of 3 levels by 3 by 3, then norm.

    With K the three parts of the kernel, shared by all levels l,

        y_l = K_same x_l + K_finer(stride 2) x_{l-1} + up(K_coarser x_{l+1}),

    ``up`` being bilinear between centres of corner pixels (as torch's
    ``upsample_bilinear``, in both sources). :class:`IntegratedBatchNorm` and
    an activation follow.

    Args:
        in_channels: Of every level.
        out_channels: Likewise.
        plain_first_level: See :class:`SEPC`, also for what follows.
        conv_cfg: Likewise.
        norm_cfg: Likewise.
        act_cfg: Likewise.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        plain_first_level: bool = False,
        conv_cfg: Optional[Config] = DEFORMABLE,
        norm_cfg: Config = BATCH_NORM,
        act_cfg: Optional[Config] = RELU,
    ) -> None:
        super().__init__()
        self.plain_first_level = plain_first_level
        self.coarser, self.same, self.finer = (
            Conv3x3(in_channels, out_channels, stride, conv_cfg)
            for stride in (1, 1, 2)
        )
        for part in (self.coarser, self.same, self.finer):
            nn.init.normal_(part.conv.weight, std=0.01)
        self.norm = IntegratedBatchNorm(out_channels, norm_cfg)
        self.act = act_layer(act_cfg)

    def forward(self, levels: Sequence[Tensor]) -> List[Tensor]:
        """Convolve levels, from the finest; sizes stay the same."""
        outputs = []
        for place, x in enumerate(levels):
            size = x.shape[-2:]
            plain = self.plain_first_level and place == 0
            y = self.same(x, plain)
            if place > 0:
                # sizes differ where a level is not half of that before,
                # rounded up; no source covers this case
                y = y + to_size(self.finer(levels[place - 1]), size)
            if place + 1 < len(levels):
                coarser = self.coarser(levels[place + 1], plain)
                y = y + to_size(coarser, size, align_corners=True)
            outputs.append(y)
        return [self.act(y) for y in self.norm(outputs)]


class IntegratedBatchNorm(nn.Module):
    """One batch norm over the pixels of all levels together.

    Its running statistics are those of all levels, too, so that a level of
    few pixels is normalized like the others. Any batch norm can be used, also
    one with statistics over several ranks.

    Args:
        channels: Of every level.
        norm_cfg: Defaults to ``dict(type='BN')``.
    """

    def __init__(self, channels: int, norm_cfg: Config = BATCH_NORM) -> None:
        super().__init__()
        self.norm = norm_layer(norm_cfg, channels)

    def forward(self, levels: Sequence[Tensor]) -> List[Tensor]:
        """Normalize levels of (N, C, H_i, W_i)."""
        pixels = [x.flatten(2) for x in levels]
        # 4 dimensions, as batch norms of maps expect
        joint = self.norm(torch.cat(pixels, 2).unsqueeze(-1)).squeeze(-1)
        parts = joint.split([x.size(2) for x in pixels], 2)
        return [part.view_as(x) for part, x in zip(parts, levels)]
