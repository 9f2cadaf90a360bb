"""A box head of transformer blocks, one branch per task."""

from typing import Any, Dict, Optional, Tuple

import torch
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmagvm.models.uninet_blocks import TransformerBlock
from mmagvm.recipes.registry import register


@register(MODELS)
class TransformerBBoxHead(BBoxHead):
    """Classifies and locates a RoI, with transformer blocks for each task.

    The RoI's H x W cells are the tokens. Each branch is ``num_blocks`` of
    :class:`TransformerBlock`, the mean over the tokens and one linear
    layer, ``fc_cls`` or ``fc_reg``. Losses and decoding are BBoxHead's.

    Source: the detector of the AGVM paper, appendix A.5.2, which has
    4 decoupled transformer blocks for either task. The paper does not give
    their width, what ends them, or whether cascade stages share them. This
    project chooses the backbone's blocks, as wide as the RoI features, with
    the mean at the end of a branch. The initial values of linear layers are
    its choice, too: weights of std 0.02, biases 0. Those of the last layers
    are BBoxHead's. There is no dropout and no stochastic depth.

    A batch without RoIs works in data-parallel training: every parameter then
    has a gradient, which is zero.

    Args:
        in_channels: Of the RoI features, and the width of all blocks.
            Defaults to 256, as BBoxHead's.
        num_blocks: In each branch. Defaults to 4.
        head_dim: Channels of an attention head. Defaults to 64.
        mlp_ratio: Hidden channels of an MLP, in ``in_channels``. Defaults
            to 4.
        layer_scale: Initial value of both gains of a block. Defaults to
            0.1, which CaiT (Touvron et al., 2021) has for up to 18 blocks.
            The backbone's 1e-6 is for its 54 blocks.
        with_cp: Recompute blocks in the backward pass, to save memory.
            Defaults to False.
        init_cfg: Instead of the initial values given above.
        kwargs: Of BBoxHead, except for ``with_avg_pool``. ``roi_feat_size``
            has no effect, as any size works.

    Raises:
        ValueError: ``in_channels`` is not a multiple of ``head_dim``, or a
            number is too small.
    """

    def __init__(
        self,
        in_channels: int = 256,
        num_blocks: int = 4,
        head_dim: int = 64,
        mlp_ratio: int = 4,
        layer_scale: float = 0.1,
        with_cp: bool = False,
        init_cfg: Any = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (
            ('in_channels', in_channels),
            ('num_blocks', num_blocks),
            ('head_dim', head_dim),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(
                    f'{name}={value!r} of TransformerBBoxHead is not a whole '
                    'number above 0: write one, such as 64'
                )
        if in_channels % head_dim:
            raise ValueError(
                f'head_dim={head_dim} of TransformerBBoxHead does not divide '
                f'in_channels={in_channels}: write a divisor of it'
            )
        if int(in_channels * mlp_ratio) < 1:
            raise ValueError(
                f'mlp_ratio={mlp_ratio!r} of TransformerBBoxHead leaves no '
                'hidden channel: write a number above 0, such as 4'
            )
        super().__init__(
            # makes the last layers as wide as a token
            with_avg_pool=True,
            in_channels=in_channels,
            init_cfg=init_cfg,
            **kwargs,
        )
        if init_cfg is None:
            # before BBoxHead's, which then sets fc_cls and fc_reg
            self.init_cfg.insert(
                0, dict(type='Normal', layer='Linear', std=0.02, bias=0)
            )
        self.with_cp = with_cp

        def branch() -> nn.ModuleList:
            return nn.ModuleList(
                TransformerBlock(
                    in_channels,
                    in_channels,
                    mlp_ratio,
                    head_dim=head_dim,
                    layer_scale=layer_scale,
                )
                for _ in range(num_blocks)
            )

        if self.with_cls:
            self.cls_blocks = branch()
        if self.with_reg:
            self.reg_blocks = branch()

    def forward(self, x: Tensor) -> Tuple[Optional[Tensor], Optional[Tensor]]:
        """Predict classes and boxes.

        Args:
            x: RoI features, (RoIs, ``in_channels``, H, W).

        Returns:
            Scores (RoIs, classes + 1), None without ``with_cls``, and deltas
            (RoIs, 4 x classes, or 4 with ``reg_class_agnostic``), None
            without ``with_reg``.
        """
        cls_score = bbox_pred = None
        if self.with_cls:
            cls_score = self.fc_cls(self._pooled(x, self.cls_blocks))
        if self.with_reg:
            bbox_pred = self.fc_reg(self._pooled(x, self.reg_blocks))
        return cls_score, bbox_pred

    def loss(
        self,
        cls_score: Optional[Tensor],
        bbox_pred: Optional[Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Dict[str, Tensor]:
        """BBoxHead's losses, always with ``loss_cls``.

        Args:
            cls_score: As :meth:`forward` returns it.
            bbox_pred: Likewise.
            args: Of ``BBoxHead.loss``.
            kwargs: Likewise.
        """
        losses: Dict[str, Tensor] = super().loss(
            cls_score, bbox_pred, *args, **kwargs
        )
        if cls_score is not None and not len(cls_score):
            # otherwise DDP would wait for the gradients of this branch
            losses['loss_cls'] = cls_score.sum()
        return losses

    def _pooled(self, x: Tensor, blocks: nn.ModuleList) -> Tensor:
        """(RoIs, C, H, W) through the blocks of a branch, to (RoIs, C)."""
        for block in blocks:
            if self.with_cp and torch.is_grad_enabled():
                x = checkpoint(
                    block,
                    x,
                    use_reentrant=False,
                    preserve_rng_state=False,  # blocks are not random
                )
            else:
                x = block(x)
        return x.mean((2, 3))
