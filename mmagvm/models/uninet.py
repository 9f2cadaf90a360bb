"""UniNet, the backbone of the paper's largest system."""

from dataclasses import dataclass, fields
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmagvm.models.uninet_blocks import (
    DSM,
    ConvBlock,
    TransformerBlock,
    build_norm,
)
from mmagvm.recipes.registry import register


def _sizes(
    stem: int,
    conv: str,
    channels: Sequence[int],
    depths: Sequence[int],
    windows: Sequence[Sequence[int]] = ((0,), (0,)),
) -> Dict[str, Any]:
    """Four stages of convolutions and two of transformers.

    Args:
        stem: Its channels.
        conv: The block of the first four stages.
        channels: Of the six stages.
        depths: Blocks of the six stages.
        windows: Of the last two stages. Defaults to none.
    """
    stages: List[Dict[str, Any]] = [
        dict(
            block='transformer' if index > 3 else conv,
            expansion=(1, 4, 6, 3, 2, 5)[index],
            channels=channels[index],
            depth=depths[index],
            stride=(1, 2, 2, 2, 1, 2)[index],
        )
        for index in range(6)
    ]
    for stage, sides in zip(stages[4:], windows):
        stage['windows'] = sides
    return dict(stem=stem, stages=stages)


#: Sizes by name. 'G' is from AGVM, Table 4, with United-Perception's stem. Its
#: windows have 448 pixels, and every third block has none. 'B1' is from
#: Sense-X/UniNet, with head_dim=32, transition='dsm' and no windows.
ARCHS: Dict[str, Dict[str, Any]] = {
    'G': _sizes(
        stem=64,
        conv='fused_mbconv',
        channels=(104, 216, 384, 576, 576, 1152),
        depths=(6, 9, 18, 18, 18, 36),
        windows=((28, 28, 0), (14, 14, 0)),
    ),
    'B1': _sizes(
        stem=32,
        conv='mbconv',
        channels=(24, 48, 80, 128, 128, 256),
        depths=(1, 2, 4, 4, 4, 8),
    ),
}


@register(MODELS)
class UniNet(BaseModule):
    """UniNet (Liu et al., ECCV 2022): convolutions, then transformers.

    ``arch='G'`` is UniNet-G (AGVM, Table 4), of 1.05 G parameters, or 1.12 G
    with squeeze-and-excitation. Table 4 gives expansions, channels and
    depths; the rest follows MB15 of United-Perception, commit 2bd6d9f, which
    has the same numbers. The ImageNet head is left out.

    With x the input of a block and g a learnt scale per channel:

    - ``'fused_mbconv'``: x + BN, conv3x3, BN, GELU, SE, conv1x1, BN of x,
      wider by ``expansion`` between the convolutions. With expansion 1:
      x + SE, conv3x3, BN of x.
    - ``'mbconv'``: likewise, with a 1x1 and a depthwise 3x3 convolution, each
      with BN and GELU, for the 3x3 one. Expansion 1 needs no 1x1 before.
    - ``'transformer'``: ``x += dwconv3x3(x)``, ``x += g * Attention(LN(x))``,
      ``x += g * MLP(LN(x))``, the MLP wider by ``expansion``.

    The first block of a stage that changes channels or stride has a max-pool
    and a 1x1 convolution as its shortcut. If it is a transformer, it pools
    between LN and attention, and has neither MLP nor drop path.

    Images may have any size. Windows at the right and lower edge are padded
    with zeros after LN, which are not masked, as in United-Perception.
    Windows of 28 in stage 4 and 14 in stage 5 are the paper's; that code has
    14 in both. Attention is in the type of its inputs, there in float32.

    Args:
        arch: ``'G'``, ``'B1'`` or ``dict(stem=channels, stages=[...])``, with
            a dict per stage, see :class:`Stage`. Defaults to ``'G'``.
        with_se: Squeeze-and-excitation in convolutional blocks. Defaults to
            True, as in United-Perception. The paper does not specify it:
            without it, UniNet-G is nearer to the paper's "1 billion".
        transition: With ``'block'`` the first block of a stage changes
            channels and stride, with ``'dsm'`` a ``DSM`` before each stage
            but the first. Defaults to ``'block'``, as in United-Perception;
            Sense-X/UniNet has the other. The paper does not specify it.
        head_dim: Channels of an attention head. Defaults to 64, as in
            United-Perception; Sense-X/UniNet has 32. The paper does not
            specify it.
        layer_scale: Initial value of g. Defaults to 1e-6.
        drop_path_rate: Of the last block; it grows evenly from 0 in the first
            block. Defaults to 0; United-Perception trains with 0.3.
        norm_cfg: Of all batch norms. Defaults to ``dict(type='BN')``;
            United-Perception trains with SyncBN.
        out_indices: Stages, from 0, whose outputs are returned. Defaults to
            (2, 4, 5), of strides 8, 16 and 32. Stages after the last of them
            are not built.
        frozen_stages: -1: nothing is frozen; n: the stem and the first n
            stages. Defaults to -1.
        norm_eval: Batch norms normalize by their running statistics, also
            in training. Defaults to False.
        with_cp: Blocks keep only their input for the backward pass, and
            compute the rest again, see
            :func:`~mmagvm.models.checkpointing.checkpointed`. Defaults to
            False.
        init_cfg: Of MMEngine modules. Defaults to None: linear weights from a
            truncated normal of 0.02, the last BN of a convolutional block 0,
            convolutions as in torch (United-Perception).

    Raises:
        ValueError: A setting is out of range, or does not fit another.
    """

    def __init__(
        self,
        arch: Union[str, Dict[str, Any]] = 'G',
        with_se: bool = True,
        transition: str = 'block',
        head_dim: int = 64,
        layer_scale: float = 1e-6,
        drop_path_rate: float = 0.0,
        norm_cfg: Optional[Dict[str, Any]] = None,
        out_indices: Sequence[int] = (2, 4, 5),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(init_cfg)
        stem, stages = read_arch(arch, head_dim)
        if transition not in ('block', 'dsm'):
            raise ValueError(
                f"transition={transition!r} of UniNet is neither 'block' nor "
                "'dsm': write one of them"
            )
        if not 0 <= drop_path_rate < 1:
            raise ValueError(
                f'drop_path_rate={drop_path_rate!r} of UniNet is not a '
                'probability: write 0 or more and less than 1, such as 0.3'
            )
        if not out_indices or not all(
            index in range(len(stages)) for index in out_indices
        ):
            raise ValueError(
                f'out_indices={out_indices!r} of UniNet are not stages: write '
                f'one or more of 0 to {len(stages) - 1}'
            )
        built = max(out_indices) + 1
        if frozen_stages not in range(-1, built + 1):
            raise ValueError(
                f'frozen_stages={frozen_stages!r} of UniNet: write -1 for '
                f'none, or how many of its {built} stages are frozen'
            )
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        norm_cfg = norm_cfg or dict(type='BN')

        self.stem = nn.Sequential(
            nn.Conv2d(3, stem, 3, 2, 1, bias=False),
            build_norm(norm_cfg, stem),
            nn.GELU(),
        )
        # a lone block has no last one
        step = drop_path_rate / max(sum(s.depth for s in stages) - 1, 1)
        self.transitions = nn.ModuleList()
        self.stages = nn.ModuleList()
        channels, number = stem, 0
        for index, stage in enumerate(stages[:built]):
            stride = stage.stride
            before: nn.Module = nn.Identity()
            if transition == 'dsm' and index:
                before = DSM(
                    channels,
                    stage.channels,
                    stride,
                    head_dim if stage.block == 'transformer' else 0,
                    norm_cfg,
                    with_cp,
                )
                channels, stride = stage.channels, 1
            blocks: List[nn.Module] = []
            for place in range(stage.depth):
                sizes = (channels, stage.channels, stage.expansion, stride)
                if stage.block == 'transformer':
                    blocks.append(
                        TransformerBlock(
                            *sizes,
                            head_dim=head_dim,
                            window=stage.windows[place % len(stage.windows)],
                            layer_scale=layer_scale,
                            drop_path=step * number,
                            with_cp=with_cp,
                        )
                    )
                else:
                    blocks.append(
                        ConvBlock(
                            *sizes,
                            fused=stage.block == 'fused_mbconv',
                            with_se=with_se,
                            drop_path=step * number,
                            norm_cfg=norm_cfg,
                            with_cp=with_cp,
                        )
                    )
                channels, stride, number = stage.channels, 1, number + 1
            self.transitions.append(before)
            self.stages.append(nn.Sequential(*blocks))
        self._freeze()

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """The features of an image, from fine to coarse.

        Args:
            x: (N, 3, H, W).

        Returns:
            (N, C, ceil(H / stride), ceil(W / stride)) of each of
            ``out_indices``, without a final norm. For UniNet-G, C is 384, 576
            and 1152, and strides are 8, 16 and 32. Under autocast, outputs of
            transformer stages are float32, as g is.
        """
        x = self.stem(x)
        outputs = []
        for index, (transition, stage) in enumerate(
            zip(self.transitions, self.stages)
        ):
            x = stage(transition(x))
            if index in self.out_indices:
                outputs.append(x)
        return tuple(outputs)

    def train(self, mode: bool = True) -> 'UniNet':
        """Set the mode; frozen parts stay in evaluation."""
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
        for part in (
            self.stem,
            *self.transitions[: self.frozen_stages],
            *self.stages[: self.frozen_stages],
        ):
            part.eval().requires_grad_(False)


@dataclass(frozen=True)
class Stage:
    """A stage of UniNet, as a dict of ``arch['stages']`` describes it.

    Args:
        block: ``'fused_mbconv'``, ``'mbconv'`` or ``'transformer'``.
        expansion: How many times wider a block is inside.
        channels: Of its output.
        depth: Number of blocks.
        stride: 1 or 2, in addition to the stem's 2.
        windows: Sides of the square windows of attention, in pixels of the
            stage, for one block after the other, repeatedly; 0 is all pixels.
            Of transformers only. Defaults to (0,).

    Raises:
        ValueError: One of these is out of range.
    """

    block: str
    expansion: int
    channels: int
    depth: int
    stride: int = 1
    windows: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        blocks = ('fused_mbconv', 'mbconv', 'transformer')
        if self.block not in blocks:
            raise ValueError(
                f'block={self.block!r} of a stage of UniNet is unknown: '
                f'write one of {", ".join(map(repr, blocks))}'
            )
        for name in ('expansion', 'channels', 'depth', 'stride'):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f'{name}={value!r} of a stage of UniNet is not a whole '
                    'number above 0: write 1 or more'
                )
        if self.stride > 2:
            raise ValueError(
                f'stride={self.stride} of a stage of UniNet skips pixels: '
                'write 1 or 2'
            )
        if not self.windows or not all(
            isinstance(size, int) and size >= 0 for size in self.windows
        ):
            raise ValueError(
                f'windows={self.windows!r} of a stage of UniNet are not sides '
                'of windows: write pixels, or 0 for all, such as (14, 14, 0)'
            )
        if any(self.windows) and self.block != 'transformer':
            raise ValueError(
                f'windows={self.windows!r} of a stage of UniNet with '
                f'block={self.block!r}: leave windows out, or write '
                "block='transformer'"
            )


def read_arch(
    arch: Union[str, Dict[str, Any]], head_dim: int
) -> Tuple[int, List[Stage]]:
    """The stem's channels and the stages.

    Args:
        arch: See :class:`UniNet`.
        head_dim: Channels of a transformer must be a multiple of it.

    Raises:
        ValueError: See :class:`UniNet`.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(
                f'arch={arch!r} of UniNet is unknown: write one of '
                f'{", ".join(map(repr, ARCHS))}, or a dict of sizes'
            )
        arch = ARCHS[arch]
    if set(arch) != {'stem', 'stages'} or not arch['stages']:
        raise ValueError(
            f'arch of UniNet has {sorted(arch)}: write '
            'dict(stem=channels, stages=[dict(block=...), ...])'
        )
    known = [field.name for field in fields(Stage)]
    needed = set(known[:4])
    stages = []
    for sizes in arch['stages']:
        if not needed <= set(sizes) <= set(known):
            raise ValueError(
                f'a stage of UniNet has {sorted(sizes)}: write '
                f'{", ".join(known[:4])}, and where they differ from their '
                f'defaults {" and ".join(known[4:])}'
            )
        stages.append(Stage(**sizes))
    stem = arch['stem']
    if not isinstance(stem, int) or stem < 1:
        raise ValueError(
            f'stem={stem!r} of UniNet is not a number of channels: write 1 '
            'or more, such as 64'
        )
    for before, stage in zip([stem, *(s.channels for s in stages)], stages):
        for channels in (before, stage.channels):
            if stage.block == 'transformer' and (
                head_dim < 1 or channels % head_dim
            ):
                raise ValueError(
                    f'head_dim={head_dim!r} of UniNet does not divide the '
                    f'{channels} channels of a transformer stage: write a '
                    'divisor of them'
                )
    return stem, stages
