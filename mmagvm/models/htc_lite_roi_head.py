"""The RoI head of HTC-Lite: a cascade with context and one mask head."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from mmdet.models.roi_heads import CascadeRoIHead
from mmdet.models.utils import empty_instances, unpack_gt_instances
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from mmengine.structures import InstanceData
from torch import Tensor

from mmagvm.recipes.registry import register

#: Feature maps of all levels, each (images, C, H, W).
Features = Tuple[Tensor, ...]


@register(MODELS)
class HTCLiteRoIHead(CascadeRoIHead):
    """A cascade of box heads, with a context vector and at most one mask head.

    Of Hybrid Task Cascade (Chen et al., CVPR 2019) HTC-Lite keeps the box
    cascade and the last mask head; there is no interleaving and no relay
    between mask heads. In place of the semantic branch, a context head
    learns which classes an image has. Its pooled vector is added to all RoI
    features of the image, those of box and of mask heads. Source: Seesaw Loss
    (Wang et al., CVPR 2021), appendix D.1; HTC-X of the AGVM paper, appendix
    A.5.2, is based on it.

    ``glbctx_head`` and its name are those of mmdet's SCNet. No source gives
    the weight of the only mask loss: it is the sum of all stages' weights, as
    in SCNet.

    Losses are ``loss_glbctx``, ``s0.loss_cls``, ``s0.loss_bbox`` and so on
    of each stage, and ``loss_mask``. All heads have a gradient for any image:
    a stage without RoIs does not end the cascade.

    Args:
        num_stages: Of the cascade.
        stage_loss_weights: One for each stage.
        glbctx_head: Config of mmdet's GlobalContextHead, or of a similar one.
            Its ``conv_out_channels`` are those of RoI features. Defaults to
            None, without context.
        kwargs: Of mmdet's CascadeRoIHead. ``bbox_roi_extractor`` and
            ``bbox_head`` are one config or one per stage, ``mask_head`` and
            ``mask_roi_extractor`` one config. Both default to None: no masks.
            A mask head without an extractor takes the last stage's
            ``bbox_roi_extractor``.

    Raises:
        ValueError: Settings per stage do not fit ``num_stages``, there are
            several mask heads, or channels or classes of the context head
            differ from those of the box heads.
    """

    def __init__(
        self,
        num_stages: int,
        stage_loss_weights: Sequence[float],
        glbctx_head: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
    ) -> None:
        for name, values in (
            ('stage_loss_weights', stage_loss_weights),
            ('bbox_head', kwargs.get('bbox_head')),
            ('bbox_roi_extractor', kwargs.get('bbox_roi_extractor')),
            ('train_cfg', kwargs.get('train_cfg')),
        ):
            if isinstance(values, (list, tuple)) and len(values) != num_stages:
                raise ValueError(
                    f'{name} of HTCLiteRoIHead has {len(values)} entries for '
                    f'num_stages={num_stages}: write one for each stage'
                )
        super().__init__(
            num_stages=num_stages,
            stage_loss_weights=stage_loss_weights,
            **kwargs,
        )
        self.glbctx_head = None
        if glbctx_head is not None:
            self.glbctx_head = MODELS.build(glbctx_head)
            self._check_context_head()

    @property
    def with_glbctx(self) -> bool:
        """Whether there is a context head."""
        return self.glbctx_head is not None

    def init_mask_head(self, mask_roi_extractor: Any, mask_head: Any) -> None:
        """Build the only mask head and its RoI extractor.

        Raises:
            ValueError: There are several of either.
        """
        for name, value in (
            ('mask_head', mask_head),
            ('mask_roi_extractor', mask_roi_extractor),
        ):
            if isinstance(value, (list, tuple)):
                raise ValueError(
                    f'{name} of HTCLiteRoIHead is a list of {len(value)}, '
                    'but HTC-Lite has only the last mask head: write '
                    f'{name}=dict(...), the last of them'
                )
        self.mask_head = MODELS.build(mask_head)
        self.mask_roi_extractor = (
            self.bbox_roi_extractor[-1]
            if mask_roi_extractor is None
            else MODELS.build(mask_roi_extractor)
        )

    def loss(
        self,
        x: Features,
        rpn_results_list: List[InstanceData],
        batch_data_samples: List[Any],
    ) -> Dict[str, Tensor]:
        """Losses of all stages, of the context and of masks.

        Args:
            x: Feature maps of the neck.
            rpn_results_list: Proposals of each image, in ``bboxes``.
            batch_data_samples: With ``gt_instances`` that have ``bboxes`` and
                ``labels``, and ``masks`` if there is a mask head.
        """
        targets, ignored, metas = unpack_gt_instances(batch_data_samples)
        losses: Dict[str, Tensor] = {}
        context = None
        if self.glbctx_head is not None:
            logits, context = self.glbctx_head(x)
            losses['loss_glbctx'] = self.glbctx_head.loss(
                logits, [target.labels for target in targets]
            )
        boxes = rpn_results_list
        for stage, weight in enumerate(self.stage_loss_weights):
            self.current_stage = stage  # samplers may read it
            samples = [
                self._sample(stage, i, x, boxes[i], targets[i], ignored[i])
                for i in range(len(metas))
            ]
            results = self.bbox_loss(stage, x, samples, context)
            for name, value in results['loss_bbox'].items():
                # other values, such as accuracies, are only logged
                factor = weight if 'loss' in name else 1
                losses[f's{stage}.{name}'] = value * factor
            if stage < self.num_stages - 1:
                with torch.no_grad():
                    boxes = self.bbox_head[stage].refine_bboxes(
                        samples, results, metas
                    )
                if boxes is None:
                    # no RoI in any image: the next stages still run, so that
                    # their parameters have a gradient on this rank
                    boxes = [InstanceData(bboxes=s.priors) for s in samples]
        if self.with_mask:
            results = self.mask_loss(x, samples, targets, context)
            weight = sum(self.stage_loss_weights)
            for name, value in results['loss_mask'].items():
                factor = weight if 'loss' in name else 1
                losses[name] = value * factor
        return losses

    def bbox_loss(
        self,
        stage: int,
        x: Features,
        sampling_results: List[Any],
        glbctx_feat: Optional[Tensor] = None,
    ) -> Dict[str, Any]:
        """Predictions and losses of one stage's box head.

        Args:
            stage: From 0.
            x: Feature maps of the neck.
            sampling_results: Of each image.
            glbctx_feat: (images, C, 1, 1), or None.

        Returns:
            With ``cls_score``, ``bbox_pred``, ``bbox_feats``, ``rois``,
            ``loss_bbox`` and ``bbox_targets``.
        """
        rois = bbox2roi([sampled.priors for sampled in sampling_results])
        results = self._bbox_forward(stage, x, rois, glbctx_feat)
        losses = self.bbox_head[stage].loss_and_target(
            cls_score=results['cls_score'],
            bbox_pred=results['bbox_pred'],
            rois=rois,
            sampling_results=sampling_results,
            rcnn_train_cfg=self.train_cfg[stage],
        )
        return {**results, 'rois': rois, **losses}

    def mask_loss(
        self,
        x: Features,
        sampling_results: List[Any],
        batch_gt_instances: List[InstanceData],
        glbctx_feat: Optional[Tensor] = None,
    ) -> Dict[str, Any]:
        """Predictions and losses of the mask head, on the last stage's RoIs.

        Args:
            x: Feature maps of the neck.
            sampling_results: Of each image, in the last stage.
            batch_gt_instances: Of each image, with ``masks``.
            glbctx_feat: (images, C, 1, 1), or None.

        Returns:
            With ``mask_preds``, ``loss_mask`` and ``mask_targets``.
        """
        rois = bbox2roi([sampled.pos_priors for sampled in sampling_results])
        results = self._mask_forward(x, rois, glbctx_feat)
        losses = self.mask_head.loss_and_target(
            mask_preds=results['mask_preds'],
            sampling_results=sampling_results,
            batch_gt_instances=batch_gt_instances,
            rcnn_train_cfg=self.train_cfg[-1],
        )
        return {**results, **losses}

    def predict(
        self,
        x: Features,
        rpn_results_list: List[InstanceData],
        batch_data_samples: List[Any],
        rescale: bool = False,
    ) -> List[InstanceData]:
        """Boxes of each image, and masks if there is a mask head.

        Args:
            x: Feature maps of the neck.
            rpn_results_list: Proposals of each image, in ``bboxes``.
            batch_data_samples: With the images' sizes and scales.
            rescale: Whether results are in pixels of the original images.
                Defaults to False.

        Returns:
            With ``bboxes``, ``scores``, ``labels`` and, maybe, ``masks``.
        """
        metas = [sample.metainfo for sample in batch_data_samples]
        context = self._context(x)
        results: List[InstanceData] = self.predict_bbox(
            x,
            metas,
            rpn_results_list,
            self.test_cfg,
            # RoIs of masks are in pixels of the input
            rescale=rescale and not self.with_mask,
            glbctx_feat=context,
        )
        if self.with_mask:
            results = self.predict_mask(x, metas, results, rescale, context)
        return results

    def predict_mask(
        self,
        x: Features,
        batch_img_metas: List[Dict[str, Any]],
        results_list: List[InstanceData],
        rescale: bool = False,
        glbctx_feat: Optional[Tensor] = None,
    ) -> List[InstanceData]:
        """Add ``masks`` to boxes.

        Args:
            x: Feature maps of the neck.
            batch_img_metas: Of each image.
            results_list: Of each image, with boxes in pixels of the input.
            rescale: As of :meth:`predict`; also rescales the boxes.
            glbctx_feat: (images, C, 1, 1), or None.
        """
        rois = bbox2roi([result.bboxes for result in results_list])
        results: List[InstanceData]
        if not len(rois):
            results = empty_instances(
                batch_img_metas,
                rois.device,
                task_type='mask',
                instance_results=results_list,
                mask_thr_binary=self.test_cfg.mask_thr_binary,
            )
            return results
        masks = self._mask_forward(x, rois, glbctx_feat)['mask_preds']
        results = self.mask_head.predict_by_feat(
            mask_preds=masks.split([len(boxes) for boxes in results_list]),
            results_list=results_list,
            batch_img_metas=batch_img_metas,
            rcnn_test_cfg=self.test_cfg,
            rescale=rescale,
        )
        return results

    def forward(
        self,
        x: Features,
        rpn_results_list: List[InstanceData],
        batch_data_samples: List[Any],
    ) -> Tuple[Any, ...]:
        """Raw outputs, without any post-processing.

        Args:
            x: Feature maps of the neck.
            rpn_results_list: Proposals of each image, in ``bboxes``; at
                least one in all.
            batch_data_samples: With the images' sizes.

        Returns:
            Scores, deltas and, with a mask head, masks. Each is a sequence
            with a tensor for each image.
        """
        metas = [sample.metainfo for sample in batch_data_samples]
        context = self._context(x)
        proposals = [result.bboxes for result in rpn_results_list]
        counts = [len(boxes) for boxes in proposals]
        rois, *outputs = self._refine_roi(
            x, bbox2roi(proposals), metas, counts, glbctx_feat=context
        )
        if self.with_mask:
            masks = self._mask_forward(x, torch.cat(rois), context)
            outputs.append(masks['mask_preds'].split(counts))
        return tuple(outputs)

    def _bbox_forward(
        self,
        stage: int,
        x: Features,
        rois: Tensor,
        glbctx_feat: Optional[Tensor] = None,
    ) -> Dict[str, Any]:
        """Predictions of one stage's box head, which mmdet's code calls."""
        features = _roi_features(
            self.bbox_roi_extractor[stage], x, rois, glbctx_feat
        )
        cls_score, bbox_pred = self.bbox_head[stage](features)
        return dict(
            cls_score=cls_score, bbox_pred=bbox_pred, bbox_feats=features
        )

    def _mask_forward(
        self, x: Features, rois: Tensor, glbctx_feat: Optional[Tensor] = None
    ) -> Dict[str, Any]:
        """Predictions of the mask head."""
        features = _roi_features(self.mask_roi_extractor, x, rois, glbctx_feat)
        return dict(mask_preds=self.mask_head(features))

    def _context(self, x: Features) -> Optional[Tensor]:
        """The context vector of each image, (images, C, 1, 1)."""
        if self.glbctx_head is None:
            return None
        context: Tensor = self.glbctx_head(x)[1]
        return context

    def _sample(
        self,
        stage: int,
        image: int,
        x: Features,
        boxes: InstanceData,
        targets: InstanceData,
        ignored: Optional[InstanceData],
    ) -> Any:
        """RoIs of an image for a stage, and their targets."""
        priors = InstanceData(priors=boxes.bboxes)
        assigned = self.bbox_assigner[stage].assign(priors, targets, ignored)
        return self.bbox_sampler[stage].sample(
            assigned,
            priors,
            targets,
            feats=[level[image][None] for level in x],
        )

    def _check_context_head(self) -> None:
        """Refuse a context head that does not fit the box heads.

        Raises:
            ValueError: See the class.
        """
        for ours, theirs, parts in (
            ('conv_out_channels', 'out_channels', self.bbox_roi_extractor),
            ('num_classes', 'num_classes', self.bbox_head),
        ):
            value = getattr(self.glbctx_head, ours, None)
            for part in parts:
                wanted = getattr(part, theirs, value)
                if value is not None and value != wanted:
                    raise ValueError(
                        f'{ours}={value} in glbctx_head of HTCLiteRoIHead '
                        f'is not that of the box heads: write {ours}={wanted}'
                    )


def _roi_features(
    extractor: Any,
    x: Features,
    rois: Tensor,
    glbctx_feat: Optional[Tensor],
) -> Tensor:
    """Features of RoIs, with the context of their images.

    Args:
        extractor: Of RoI features.
        x: Feature maps of the neck.
        rois: (RoIs, 5), the index of an image and a box each.
        glbctx_feat: (images, C, 1, 1), or None.

    Returns:
        (RoIs, C, H, W), in 32 bits under mixed precision.
    """
    # The extractor casts boxes to the type of the maps. 16 bits are too few
    # for them: in bfloat16 a coordinate above 1024 is a multiple of 8.
    levels = [
        level.float() if level.dtype.itemsize < 4 else level
        for level in x[: extractor.num_inputs]
    ]
    features: Tensor = extractor(levels, rois)
    if glbctx_feat is None:
        return features
    return features + glbctx_feat[rois[:, 0].long()]
