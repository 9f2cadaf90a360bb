"""A bidirectional pyramid in one bottom-up pass (RCNet)."""

from typing import List, Optional, Sequence, Tuple

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional

from mmagvm.models.pyramid import (
    BATCH_NORM,
    DEFORMABLE,
    RELU,
    Config,
    Conv3x3,
    check_least,
    conv1x1,
    to_size,
)
from mmagvm.recipes.registry import register


@register(MODELS)
class RCNet(BaseModule):
    """RCNet (Zong et al., "RCNet: Reverse Feature Pyramid and Cross-scale
    Shift Network for Object Detection", ACM MM 2021).

    A 1x1 convolution with norm takes each level of the backbone to
    ``out_channels``. Then :class:`RevFP` runs ``num_stages`` times and
    :class:`CrossScaleShift` once. 3x3 convolutions of stride 2, each with
    norm, make further levels from the highest one. The first takes the level
    itself, each other one an activation of the level before.

    Defaults are those of United-Perception (``mb15`` at commit 2bd6d9f), the
    neck of AGVM's largest detector up to P7. This project makes P8 like P7,
    as no source has a P8. RCNet's own code has ``num_stages=1``,
    ``num_fused=num_outs``, ``shift_divisor=16``, ``shift_reach=2``,
    ``pool_size=2``, ``conv_cfg=dict(type='DCNv2', deform_groups=2)``. Its
    further levels are 1x1 convolutions and pooling, which this class lacks.

    Linear weights start from Xavier's uniform distribution; gates, attention
    and offsets start at zero.

    Args:
        in_channels: Of the backbone's levels, from the finest.
        out_channels: Of all levels of the output.
        num_outs: Number of output levels.
        start_level: First level of the backbone to use. Defaults to 0.
        num_stages: How often RevFP runs, each time with its own weights.
            Defaults to 2.
        num_fused: Number of levels in RevFP and in the shift. Defaults to
            None, those of the backbone. With more, further levels are made
            before them.
        shift_divisor: A level takes ``out_channels // shift_divisor``
            channels from each neighbour. Defaults to 8.
        shift_reach: How far neighbours are: 1 means one level up and one
            down, 2 means also two up and two down. Defaults to 1.
        pool_size: Max-pooling between levels: 3 (stride 2, padding 1; the
            default) or 2 (stride 2, odd sides replicated).
        conv_cfg: Of 3x3 convolutions: ``dict(type='DCN')``, the default,
            ``dict(type='DCNv2')``, or None for plain ones.
        norm_cfg: Defaults to ``dict(type='BN')``.
        act_cfg: Defaults to ``dict(type='ReLU')``.
        init_cfg: Of MMEngine, instead of the above. Note that
            ``layer='Conv2d'`` includes gates and offsets.

    Raises:
        ValueError: A setting is out of range or, in the forward, the number
            of levels differs from that of ``in_channels``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int = 0,
        num_stages: int = 2,
        num_fused: Optional[int] = None,
        shift_divisor: int = 8,
        shift_reach: int = 1,
        pool_size: int = 3,
        conv_cfg: Optional[Config] = DEFORMABLE,
        norm_cfg: Optional[Config] = BATCH_NORM,
        act_cfg: Optional[Config] = RELU,
        init_cfg: Optional[Config] = None,
    ) -> None:
        super().__init__(init_cfg)
        check_least('RCNet', 'start_level', start_level, 0)
        check_least('RCNet', 'num_stages', num_stages, 1)
        used = list(in_channels)[start_level:]
        if len(used) < 1:
            raise ValueError(
                f'start_level={start_level} of RCNet leaves none of the '
                f'{len(in_channels)} levels of in_channels: write less'
            )
        fused = len(used) if num_fused is None else num_fused
        check_least('RCNet', 'num_fused', fused, max(len(used), 2))
        check_least('RCNet', 'num_outs', num_outs, fused)
        self.num_ins = len(in_channels)
        self.start_level = start_level
        self.num_fused = fused
        self.laterals = nn.ModuleList(
            conv1x1(channels, out_channels, norm_cfg) for channels in used
        )
        self.extras = nn.ModuleList(
            Conv3x3(
                out_channels,
                out_channels,
                stride=2,
                conv_cfg=conv_cfg,
                norm_cfg=norm_cfg,
                act_cfg=act_cfg if place else None,
            )
            for place in range(num_outs - len(used))
        )
        self.stages = nn.ModuleList(
            RevFP(out_channels, fused, pool_size, conv_cfg, norm_cfg, act_cfg)
            for _ in range(num_stages)
        )
        self.shift = CrossScaleShift(
            out_channels, fused, shift_divisor, shift_reach, norm_cfg, act_cfg
        )
        for lateral in self.laterals:
            _init_xavier(lateral)

    def forward(self, inputs: Sequence[Tensor]) -> Tuple[Tensor, ...]:
        """Fuse the levels of a backbone.

        Args:
            inputs: (N, ``in_channels[i]``, H_i, W_i), from the finest; the
                sides of a level are half of those before.

        Returns:
            ``num_outs`` of (N, ``out_channels``, H_i, W_i) from
            ``start_level`` on, further ones of half the sides, rounded up.
        """
        if len(inputs) != self.num_ins:
            raise ValueError(
                f'in_channels of RCNet names {self.num_ins} levels, but the '
                f'input has {len(inputs)}: write one number for each of '
                'out_indices of the backbone'
            )
        levels: List[Tensor] = [
            lateral(x)
            for lateral, x in zip(self.laterals, inputs[self.start_level :])
        ]
        before = self.num_fused - len(levels)
        for extra in self.extras[:before]:
            levels.append(extra(levels[-1]))
        for stage in self.stages:
            levels = stage(levels)
        levels = self.shift(levels)
        for extra in self.extras[before:]:
            levels.append(extra(levels[-1]))
        return tuple(levels)


class RevFP(nn.Module):
    """Reverse feature pyramid: top-down and bottom-up in one pass.

    From the finest level on, a node joins a level with the one above and
    with the output of the finer one:
    p_l = node(c_l, up(c_{l+1}), down(p_{l-1})). See :class:`GatedNode`.

    Args:
        channels: Of all levels.
        num_levels: 2 or more.
        pool_size: Of ``down``, a max-pooling: 3 (stride 2, padding 1) or 2
            (stride 2, odd sides replicated). ``up`` is bilinear.
        conv_cfg: See :class:`RCNet`, also for what follows.
        norm_cfg: Likewise.
        act_cfg: Likewise.

    Raises:
        ValueError: ``pool_size`` is neither 2 nor 3.
    """

    def __init__(
        self,
        channels: int,
        num_levels: int,
        pool_size: int = 3,
        conv_cfg: Optional[Config] = DEFORMABLE,
        norm_cfg: Optional[Config] = BATCH_NORM,
        act_cfg: Optional[Config] = RELU,
    ) -> None:
        super().__init__()
        if pool_size not in (2, 3):
            raise ValueError(
                f'pool_size={pool_size!r} of RCNet is unknown: write 3 '
                '(padded) or 2'
            )
        self.pool_size = pool_size
        self.nodes = nn.ModuleList(
            GatedNode(
                channels,
                place < num_levels - 1,
                place > 0,
                conv_cfg,
                norm_cfg,
                act_cfg,
            )
            for place in range(num_levels)
        )

    def forward(self, levels: Sequence[Tensor]) -> List[Tensor]:
        """Fuse levels, from the finest; shapes stay the same."""
        joined: List[Tensor] = []
        for place, (node, x) in enumerate(zip(self.nodes, levels)):
            size = x.shape[-2:]
            upper = lower = None
            if place + 1 < len(levels):
                upper = to_size(levels[place + 1], size)
            if joined:
                # levels of a backbone that rounds down are smaller than this
                lower = to_size(self._pool(joined[-1]), size)
            joined.append(node(x, upper, lower))
        return joined

    def _pool(self, x: Tensor) -> Tensor:
        if self.pool_size == 3:
            return functional.max_pool2d(x, 3, stride=2, padding=1)
        # a replicated row does not change a maximum
        return functional.max_pool2d(x, 2, stride=2, ceil_mode=True)


class GatedNode(nn.Module):
    """Joins a level with the one above, the one below, or both.

    A gate weighs two maps by one number per image,

        w = sigmoid(conv1x1([mean x; mean z])),    y = w x + (1 - w) z.

    The level above is first weighed per pixel, by an attention of mean 1,

        a = H W softmax_HW(t C^-1/2 conv3x3([x; upper])),

    but the gate takes its mean from before. With the level above, then the
    one below, and conv an activation, a 3x3 convolution and a norm:

        y = gate(x, a upper),    out = conv(gate'(conv'(y), lower)).

    Gates and attention start at zero, so that w = 1/2 and a = 1.

    Args:
        channels: C, of all levels.
        has_upper: There is a level above.
        has_lower: There is one below.
        conv_cfg: See :class:`RCNet`, also for what follows.
        norm_cfg: Likewise.
        act_cfg: Likewise.
    """

    def __init__(
        self,
        channels: int,
        has_upper: bool,
        has_lower: bool,
        conv_cfg: Optional[Config] = DEFORMABLE,
        norm_cfg: Optional[Config] = BATCH_NORM,
        act_cfg: Optional[Config] = RELU,
    ) -> None:
        super().__init__()

        def conv() -> Conv3x3:
            return Conv3x3(
                channels,
                channels,
                conv_cfg=conv_cfg,
                norm_cfg=norm_cfg,
                act_cfg=act_cfg,
            )

        if has_upper:
            # softmax is blind to a bias
            self.attention = nn.Conv2d(
                2 * channels, 1, 3, padding=1, bias=False
            )
            nn.init.zeros_(self.attention.weight)
            self.temperature = nn.Parameter(torch.ones(1))
            self.upper_gate = _gate(channels)
        if has_lower:
            self.lower_gate = _gate(channels)
        if has_upper and has_lower:
            self.between = conv()
        self.out = conv()

    def forward(
        self, x: Tensor, upper: Optional[Tensor], lower: Optional[Tensor]
    ) -> Tensor:
        """Join the levels, each (N, C, H, W); None for a missing one."""
        if upper is not None:
            weight = _gate_weight(self.upper_gate, x, upper)
            x = weight * x + (1 - weight) * self._attended(x, upper)
            if lower is not None:
                x = self.between(x)
        if lower is not None:
            weight = _gate_weight(self.lower_gate, x, lower)
            x = weight * x + (1 - weight) * lower
        output: Tensor = self.out(x)
        return output

    def _attended(self, x: Tensor, upper: Tensor) -> Tensor:
        scores = self.attention(torch.cat([x, upper], 1)).flatten(2)
        scores = scores * (self.temperature * x.size(1) ** -0.5)
        attention = scores.softmax(-1) * scores.size(-1)
        attended: Tensor = attention.view_as(x[:, :1]) * upper
        return attended


def _gate(channels: int) -> nn.Conv2d:
    gate = nn.Conv2d(2 * channels, 1, 1)
    nn.init.zeros_(gate.weight)
    assert gate.bias is not None
    nn.init.zeros_(gate.bias)
    return gate


def _gate_weight(gate: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    means = torch.cat([x, z], 1).mean((2, 3), keepdim=True)
    weight: Tensor = gate(means).sigmoid()
    return weight


class CrossScaleShift(nn.Module):
    """Cross-scale shift network (CSN): levels exchange channels.

    All levels are resized to the second one. In addition to its own C
    channels, each takes some of its neighbours', cyclically
    (:meth:`shifted`). Per level follow a 1x1 convolution back to C, norm,
    activation and another 1x1 convolution, and the level is added. Two
    contexts of an image, vectors of C, are added to all levels: over scales
    (of each level's mean) and over pixels (of the mean of levels), see
    :class:`ContextPool`. The sum, resized back, is added to the level.
    Resizing is an adaptive max-pooling where a map shrinks, and bilinear
    where it grows.

    Args:
        channels: C, of all levels.
        num_levels: L, 2 or more.
        divisor: ``channels // divisor`` channels come from a neighbour.
        reach: Largest distance of a neighbour, in levels.
        norm_cfg: See :class:`RCNet`, also for what follows.
        act_cfg: Likewise.

    Raises:
        ValueError: ``divisor`` does not divide ``channels``, or is too small
            for ``reach``.
    """

    def __init__(
        self,
        channels: int,
        num_levels: int,
        divisor: int = 8,
        reach: int = 1,
        norm_cfg: Optional[Config] = BATCH_NORM,
        act_cfg: Optional[Config] = RELU,
    ) -> None:
        super().__init__()
        check_least('RCNet', 'shift_reach', reach, 1)
        # a channel goes to one neighbour at most
        check_least('RCNet', 'shift_divisor', divisor, 2 * reach)
        if channels % divisor:
            raise ValueError(
                f'shift_divisor={divisor} of RCNet does not divide '
                f'out_channels={channels}: write a divisor of it'
            )
        self.part = channels // divisor
        self.reach = reach
        wide = channels + 2 * reach * self.part
        self.mixers = nn.ModuleList(
            nn.Sequential(
                *conv1x1(wide, channels, norm_cfg, act_cfg),
                nn.Conv2d(channels, channels, 1),
            )
            for _ in range(num_levels)
        )
        self.scale_context = ContextPool(channels)
        self.pixel_context = ContextPool(channels)
        _init_xavier(self)

    def forward(self, levels: Sequence[Tensor]) -> List[Tensor]:
        """Fuse levels, from the finest; shapes stay the same."""
        size = levels[1].shape[-2:]
        x = torch.stack([_resized(level, size) for level in levels], 1)
        wide = self.shifted(x)
        mixed = [mixer(wide[:, i]) for i, mixer in enumerate(self.mixers)]
        x = x + torch.stack(mixed, 1)
        by_level = x.mean((3, 4)).transpose(1, 2).unsqueeze(-1)
        context = self.scale_context(by_level) + self.pixel_context(x.mean(1))
        return [
            level + _resized(x[:, i] + context, level.shape[-2:])
            for i, level in enumerate(levels)
        ]

    def shifted(self, x: Tensor) -> Tensor:
        """Put channels of other levels before a level's own.

        The first C / ``divisor`` are those of the next level, the following
        C / ``divisor`` those of the level before, and so on for levels at
        distance 2. The level after the last is the first.

        Args:
            x: (N, L, C, H, W).

        Returns:
            (N, L, C + 2 * ``reach`` * C / ``divisor``, H, W).
        """
        steps = [
            step
            for distance in range(1, self.reach + 1)
            for step in (distance, -distance)
        ]
        parts = x[:, :, : len(steps) * self.part].split(self.part, 2)
        taken = [part.roll(-step, 1) for part, step in zip(parts, steps)]
        return torch.cat([*taken, x], 2)


class ContextPool(nn.Module):
    """A vector of an image: the mean of positions by attention, 1x1 conv.

    With s = conv1x1(x), one number per position: conv1x1(sum softmax(s) x).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        # softmax is blind to a bias
        self.attention = nn.Conv2d(channels, 1, 1, bias=False)
        self.transform = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Take (N, C, H, W) to (N, C, 1, 1)."""
        weights = self.attention(x).flatten(2).softmax(-1).view_as(x[:, :1])
        pooled = (weights * x).sum((2, 3), keepdim=True)
        output: Tensor = self.transform(pooled)
        return output


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    height, width = x.shape[-2:]
    if x.shape[-2:] != size and height >= size[0] and width >= size[1]:
        return functional.adaptive_max_pool2d(x, list(size))
    return to_size(x, size)


def _init_xavier(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
