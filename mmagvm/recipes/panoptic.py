"""Reads COCO's panoptic annotations without panopticapi."""

from typing import Any, Dict, Optional

import numpy as np
from mmengine.fileio import get
from mmengine.registry import TRANSFORMS

from mmagvm.recipes.registry import register

#: A pixel of no segment.
IGNORED = 255


@register(TRANSFORMS)
class LoadPanopticSegments:
    """Masks and the semantic map from a COCO panoptic PNG.

    Reads what mmdet's LoadPanopticAnnotations reads for training, except for
    boxes and labels, which mmdet's LoadAnnotations reads before. mmdet's
    transform needs ``panopticapi``, which is on no package index.

    Args:
        backend_args: Of MMEngine's file backend.
    """

    def __init__(self, backend_args: Optional[Dict[str, Any]] = None) -> None:
        self.backend_args = backend_args

    def __call__(self, results: Dict[str, Any]) -> Dict[str, Any]:
        """Add ``gt_masks`` of the things and ``gt_seg_map`` of all.

        Args:
            results: With ``seg_map_path``, ``segments_info`` and
                ``ori_shape``, as CocoPanopticDataset gives them.
        """
        # imported here, as importing mmagvm must not need mmcv and mmdet
        import mmcv
        from mmdet.structures.mask import BitmapMasks

        content = get(results['seg_map_path'], backend_args=self.backend_args)
        rgb = mmcv.imfrombytes(content, flag='color', channel_order='rgb')
        # the format's definition: id = R + 256 G + 65536 B
        ids = rgb.astype(np.int64) @ np.array([1, 256, 65536])
        seg_map = np.full(ids.shape, IGNORED, dtype=np.uint8)
        masks = []
        for segment in results['segments_info']:
            inside = ids == segment['id']
            seg_map[inside] = segment['category']
            if segment['is_thing']:
                masks.append(inside.astype(np.uint8))
        results['gt_masks'] = BitmapMasks(masks, *ids.shape)
        results['gt_seg_map'] = seg_map
        # mmdet's LoadAnnotations sets it, too, if it reads a map
        results['ignore_index'] = IGNORED
        return results
