"""UniNet, a backbone of convolution and transformer stages."""

from contextlib import contextmanager, nullcontext
from typing import (
    Any,
    ContextManager,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import torch
import torch.nn.functional as F  # noqa: N812
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmagvm.models.pyramid import BATCH_NORM, Config, norm_layer
from mmagvm.models.transformer_block import (
    Attention,
    DropPath,
    TransformerBlock,
)
from mmagvm.recipes.registry import register

BLOCKS = ('fused_mbconv', 'mbconv', 'transformer')
#: By name, the stages of a size. ``windows`` are repeated along the blocks of
#: a stage, in cells; None attends to the whole map.
ARCHS: Dict[str, List[Config]] = dict(
    # AGVM, appendix, Table 4: 448 pixels in both windows
    G=[
        dict(block='fused_mbconv', expansion=1, channels=104, depth=6),
        dict(
            block='fused_mbconv', expansion=4, channels=216, depth=9, stride=2
        ),
        dict(
            block='fused_mbconv', expansion=6, channels=384, depth=18, stride=2
        ),
        dict(
            block='fused_mbconv', expansion=3, channels=576, depth=18, stride=2
        ),
        dict(
            block='transformer',
            expansion=2,
            channels=576,
            depth=18,
            windows=(28, 28, None),
        ),
        dict(
            block='transformer',
            expansion=5,
            channels=1152,
            depth=36,
            stride=2,
            windows=(14, 14, None),
        ),
    ]
)


@register(MODELS)
class UniNet(BaseModule):
    """UniNet (Liu et al., "UniNet: Unified Architecture Search with
    Convolution, Transformer, and MLP", ECCV 2022); ``G`` is that of AGVM.

    A stem halves the image. Stages of fused MBConv blocks and then of
    transformer blocks follow, the latter with attention within windows or
    over the whole map. Table 4 of AGVM's appendix has the sizes of UniNet-G;
    blocks, transitions and squeeze-and-excitation are those of
    United-Perception (``mb15`` at commit 2bd6d9f), whose sizes are the same.
    There is no ImageNet head and no norm of the outputs.

    Linear weights begin by a normal distribution of standard deviation 0.02,
    convolutions by Kaiming's: a choice of this project.

    Args:
        arch: 'G', or stages of your own: dictionaries with ``block``
            ('fused_mbconv', 'mbconv' with a depthwise convolution, or
            'transformer'), ``channels``, ``depth``, ``expansion`` (hidden
            channels, of an MLP's in ``channels``), ``stride`` (1 or 2,
            defaults to 1) and, of transformers, ``windows``.
        out_indices: Stages to put out. Defaults to (2, 4, 5), of UniNet-G
            the strides 8, 16 and 32 with 384, 576 and 1152 channels.
        stem_channels: Defaults to 64.
        with_se: Squeeze-and-excitation in MBConv blocks. Defaults to True.
        transition: Where channels and stride change: 'block', in the first
            block of a stage, or 'dsm', in the down-sampling modules of
            UniNet before it. Defaults to 'block'.
        head_dim: Channels of an attention head. Defaults to 64; UniNet's own
            is 32.
        layer_scale: Initial gain of attention and MLP. Defaults to 1e-6.
        drop_path_rate: Of the last block; that of others grows linearly from
            0. Defaults to 0.
        norm_cfg: Of convolutions. Defaults to ``dict(type='BN')``.
        frozen_stages: The stem and the stages up to this one are not
            trained. Defaults to -1, for none.
        norm_eval: Keep batch norms in evaluation mode. Defaults to False.
        with_cp: Compute each block again in the backward pass, for memory.
            Batch statistics count once; SyncBN sends them twice. Defaults to
            False.
        init_cfg: Of MMEngine.

    Raises:
        ValueError: A setting has no meaning.
    """

    def __init__(
        self,
        arch: Union[str, Sequence[Config]] = 'G',
        out_indices: Sequence[int] = (2, 4, 5),
        stem_channels: int = 64,
        with_se: bool = True,
        transition: str = 'block',
        head_dim: int = 64,
        layer_scale: float = 1e-6,
        drop_path_rate: float = 0.0,
        norm_cfg: Config = BATCH_NORM,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Optional[Config] = None,
    ) -> None:
        super().__init__(init_cfg)
        stages = _stages(arch)
        _check(stages, out_indices, transition, head_dim, drop_path_rate)
        self.out_indices = tuple(out_indices)
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        self.with_cp = with_cp
        self.stem = nn.Sequential(
            nn.Conv2d(3, stem_channels, 3, 2, 1, bias=False),
            norm_layer(norm_cfg, stem_channels),
            nn.GELU(),
        )
        count = sum(stage['depth'] for stage in stages)
        drops = [
            drop_path_rate * place / max(1, count - 1)
            for place in range(count)
        ]
        self.transitions = nn.ModuleList()
        self.stages = nn.ModuleList()
        channels = stem_channels
        for index, stage in enumerate(stages):
            # UniNet has none before the first stage
            own = transition == 'dsm' and index > 0
            self.transitions.append(
                _down_sampling(stage, channels, norm_cfg)
                if own
                else nn.Identity()
            )
            self.stages.append(
                nn.Sequential(
                    *_blocks(
                        stage,
                        stage['channels'] if own else channels,
                        1 if own else stage.get('stride', 1),
                        [drops.pop(0) for _ in range(stage['depth'])],
                        with_se,
                        head_dim,
                        layer_scale,
                        norm_cfg,
                    )
                )
            )
            channels = stage['channels']
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out')
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._freeze()

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Features of images.

        Args:
            x: (N, 3, H, W), of any size.

        Returns:
            (N, channels, H / stride, W / stride) of each stage of
            ``out_indices``, sides rounded up.
        """
        x = self.stem(x)
        outputs = []
        for index, (transition, stage) in enumerate(
            zip(self.transitions, self.stages)
        ):
            x = transition(x)
            assert isinstance(stage, nn.Sequential)
            for block in stage:
                x = self._run(block, x)
            if index in self.out_indices:
                outputs.append(x)
        return tuple(outputs)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        output: Tensor
        if self.with_cp and torch.is_grad_enabled():

            def contexts() -> Tuple[ContextManager[Any], ContextManager[Any]]:
                return nullcontext(), kept_statistics(block)

            output = checkpoint(
                block, x, use_reentrant=False, context_fn=contexts
            )
        else:
            output = block(x)
        return output

    def train(self, mode: bool = True) -> 'UniNet':
        """Also keeps frozen stages and, with ``norm_eval``, norms fixed."""
        super().train(mode)
        self._freeze()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        last = self.frozen_stages + 1
        for part in (
            self.stem,
            *self.transitions[:last],
            *self.stages[:last],
        ):
            part.eval()
            part.requires_grad_(False)


def _stages(arch: Union[str, Sequence[Config]]) -> List[Config]:
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(
                f'arch={arch!r} of UniNet is none of {list(ARCHS)}: write one '
                'of them, or a list of stages'
            )
        return ARCHS[arch]
    return [dict(stage) for stage in arch]


def _check(
    stages: List[Config],
    out_indices: Sequence[int],
    transition: str,
    head_dim: int,
    drop_path_rate: float,
) -> None:
    """Raise a ValueError if a setting has no meaning."""
    needed = {'block', 'channels', 'depth', 'expansion'}
    known = {*needed, 'stride', 'windows'}
    for index, stage in enumerate(stages):
        where = f'stage {index} in arch of UniNet'
        if needed - set(stage) or set(stage) - known:
            raise ValueError(
                f'{where} has {sorted(stage)}: write {sorted(needed)} and, if '
                "wanted, 'stride' and 'windows'"
            )
        if stage['block'] not in BLOCKS:
            raise ValueError(
                f'{where} has block={stage["block"]!r}: write one of {BLOCKS}'
            )
        if stage.get('stride', 1) not in (1, 2):
            raise ValueError(
                f'{where} has stride={stage["stride"]!r}: write 1 or 2'
            )
        before = stages[index - 1]['channels'] if index else head_dim
        if stage['block'] == 'transformer' and (
            stage['channels'] % head_dim or before % head_dim
        ):
            raise ValueError(
                f'head_dim={head_dim} of UniNet does not divide the channels '
                f'of {where} or of the one before: write a divisor of them'
            )
    if not out_indices or not all(
        0 <= index < len(stages) for index in out_indices
    ):
        raise ValueError(
            f'out_indices={tuple(out_indices)} of UniNet: write stages, from 0'
            f' to {len(stages) - 1}'
        )
    if transition not in ('block', 'dsm'):
        raise ValueError(
            f"transition={transition!r} of UniNet: write 'block' or 'dsm'"
        )
    if not 0 <= drop_path_rate < 1:
        raise ValueError(
            f'drop_path_rate={drop_path_rate} of UniNet is a probability: '
            'write a number from 0 to below 1'
        )


def _blocks(
    stage: Config,
    in_channels: int,
    stride: int,
    drops: List[float],
    with_se: bool,
    head_dim: int,
    layer_scale: float,
    norm_cfg: Config,
) -> Iterator[nn.Module]:
    """The blocks of a stage, of which the first changes what has to."""
    channels = stage['channels']
    windows = stage.get('windows') or (None,)
    for place, drop in enumerate(drops):
        first = place == 0
        before = in_channels if first else channels
        step = stride if first else 1
        window = windows[place % len(windows)]
        if stage['block'] != 'transformer':
            yield MBConv(
                before,
                channels,
                stage['expansion'],
                step,
                stage['block'] == 'mbconv',
                with_se,
                drop,
                norm_cfg,
            )
        elif before == channels and step == 1:
            yield TransformerBlock(
                channels,
                head_dim,
                stage['expansion'],
                layer_scale,
                window,
                drop,
            )
        else:
            yield AttentionTransition(
                before, channels, step, head_dim, layer_scale, window, drop
            )


class Shortcut(nn.Sequential):
    """The identity where it fits, else max-pooling and a 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        layers: List[nn.Module] = []
        if stride == 2:
            layers.append(nn.MaxPool2d(3, 2, 1))
        if stride == 2 or in_channels != channels:
            layers.append(nn.Conv2d(in_channels, channels, 1, bias=False))
        super().__init__(*layers)


class SqueezeExcitation(nn.Module):
    """Gains per channel, from the mean of each (Hu et al., CVPR 2018).

    Args:
        channels: Of the input; a quarter of them is in between.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 4, 1)
        self.excite = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same."""
        mean = x.mean((2, 3), keepdim=True)
        gains = self.excite(self.squeeze(mean).relu())
        output: Tensor = x * F.hardsigmoid(gains)
        return output


class MBConv(nn.Module):
    """An inverted bottleneck, fused or with a depthwise convolution.

    With hidden channels h = ``in_channels`` x ``expansion``, fused: BN, conv
    3x3 to h, BN, GELU, SE, conv 1x1, BN. The last norm's gain begins at zero.
    An expansion of 1 leaves SE, conv 3x3, BN.

    Source: United-Perception, ``mb15`` at commit 2bd6d9f; the depthwise one
    is UniNet's, in the same order.

    Args:
        in_channels: Of the input.
        channels: Of the output.
        expansion: Hidden channels, in ``in_channels``.
        stride: 1 or 2.
        depthwise: Conv 1x1 to h, BN, GELU, depthwise 3x3 instead of conv 3x3.
        with_se: Whether there is squeeze-and-excitation.
        drop_path: As of ``DropPath``.
        norm_cfg: Of all norms.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        expansion: int,
        stride: int,
        depthwise: bool,
        with_se: bool,
        drop_path: float,
        norm_cfg: Config,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: List[nn.Module] = []
        if expansion > 1:
            layers.append(norm_layer(norm_cfg, in_channels))
            if depthwise:
                layers += [
                    nn.Conv2d(in_channels, hidden, 1, bias=False),
                    norm_layer(norm_cfg, hidden),
                    nn.GELU(),
                ]
            layers += [
                nn.Conv2d(
                    hidden if depthwise else in_channels,
                    hidden,
                    3,
                    stride,
                    1,
                    groups=hidden if depthwise else 1,
                    bias=False,
                ),
                norm_layer(norm_cfg, hidden),
                nn.GELU(),
            ]
        if with_se:
            layers.append(SqueezeExcitation(hidden))
        layers.append(
            nn.Conv2d(hidden, channels, 1)
            if expansion > 1
            else nn.Conv2d(hidden, channels, 3, stride, 1, bias=False)
        )
        last = norm_layer(norm_cfg, channels)
        if isinstance(last.weight, Tensor):
            nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(*layers, last)
        self.shortcut = Shortcut(in_channels, channels, stride)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ``in_channels``, H, W) to (N, ``channels``, H', W')."""
        output: Tensor = self.drop_path(self.layers(x)) + self.shortcut(x)
        return output


class AttentionTransition(nn.Module):
    """The first block of a transformer stage, where channels or stride change.

        x <- x + dwconv3x3(x)
        y = shortcut(x) + g1 * attention(pool(LN(x)))

    The attention is as wide as the input, and its projection as the output.
    Source: United-Perception, ``mb15`` at commit 2bd6d9f.

    Args:
        in_channels: Of the input.
        channels: Of the output.
        stride: 1 or 2.
        head_dim: As of :class:`TransformerBlock`, of which there is no MLP.
        layer_scale: Likewise.
        window: Likewise.
        drop_path: Likewise.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        head_dim: int,
        layer_scale: float,
        window: Optional[int],
        drop_path: float,
    ) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(
            in_channels, in_channels, 3, padding=1, groups=in_channels
        )
        self.norm = nn.LayerNorm(in_channels)
        self.pool = nn.MaxPool2d(3, 2, 1) if stride == 2 else nn.Identity()
        self.attention = Attention(in_channels, channels, head_dim, window)
        self.gain = nn.Parameter(torch.full((channels,), float(layer_scale)))
        self.shortcut = Shortcut(in_channels, channels, stride)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ``in_channels``, H, W) to (N, ``channels``, H', W')."""
        x = x + self.dwconv(x)
        normed = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        mixed = self.attention(self.pool(normed).permute(0, 2, 3, 1))
        branch = self.drop_path(self.gain * mixed)
        output: Tensor = self.shortcut(x) + branch.permute(0, 3, 1, 2)
        return output


def _down_sampling(
    stage: Config, in_channels: int, norm_cfg: Config
) -> nn.Module:
    """UniNet's module before a stage."""
    kind = (
        LocalGlobalDownSampling
        if stage['block'] == 'transformer'
        else LocalDownSampling
    )
    return kind(
        in_channels, stage['channels'], stage.get('stride', 1), norm_cfg
    )


class LocalDownSampling(nn.Module):
    """Depthwise 3x3 convolution, BN, 1x1, beside a shortcut (UniNet).

    Args:
        in_channels: Of the input.
        channels: Of the output.
        stride: 1 or 2.
        norm_cfg: Of the norm.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, norm_cfg: Config
    ) -> None:
        super().__init__()
        self.local = nn.Sequential(
            nn.Conv2d(
                in_channels,
                in_channels,
                3,
                stride,
                1,
                groups=in_channels,
                bias=False,
            ),
            norm_layer(norm_cfg, in_channels),
            nn.Conv2d(in_channels, channels, 1),
        )
        layers: List[nn.Module] = [nn.Conv2d(in_channels, channels, 1)]
        if stride == 2:
            layers.insert(0, nn.MaxPool2d(3, 2, 1))
        self.shortcut = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ``in_channels``, H, W) to (N, ``channels``, H', W')."""
        output: Tensor = self.local(x) + self.shortcut(x)
        return output


class LocalGlobalDownSampling(LocalDownSampling):
    """The same path as queries, which attend to all of the input (UniNet).

    Heads have 32 channels.
    """

    HEAD_DIM = 32

    def __init__(
        self, in_channels: int, channels: int, stride: int, norm_cfg: Config
    ) -> None:
        super().__init__(in_channels, channels, stride, norm_cfg)
        self.query_norm = nn.LayerNorm(channels)
        self.input_norm = nn.LayerNorm(in_channels)
        self.key_value = nn.Linear(in_channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ``in_channels``, H, W) to (N, ``channels``, H', W')."""
        local = self.local(x)
        size = local.shape[2:]
        queries = self.query_norm(local.flatten(2).transpose(1, 2))
        inputs = self.input_norm(x.flatten(2).transpose(1, 2))
        keys, values = self.key_value(inputs).chunk(2, -1)
        # each (N, heads, tokens, channels of a head)
        q, k, v = (
            part.unflatten(-1, (-1, self.HEAD_DIM)).transpose(1, 2)
            for part in (queries, keys, values)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        y = self.proj(mixed.transpose(1, 2).flatten(2))
        y = y.transpose(1, 2).unflatten(2, size)
        output: Tensor = y + self.shortcut(x)
        return output


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms in a module leave their running statistics as they are.

    They normalize by the batch all the same: for a forward pass that is
    computed a second time.
    """
    norms = [
        part
        for part in module.modules()
        if isinstance(part, _BatchNorm) and part.track_running_stats
    ]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, kept):
            norm.momentum = momentum
            norm.num_batches_tracked = tracked
