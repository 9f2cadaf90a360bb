"""Imports torchvision with a torch that does not fit its operators.

PyPI's torchvision is built for PyPI's torch, with CUDA. Beside torch for CPUs
its library cannot be loaded, and importing it fails.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

#: Where setup_env.sh puts it: MMEngine imports torchvision when a run starts,
#: if it finds one, and does not survive that import's failure.
FOLDER = Path(sys.prefix) / 'torchvision'


def has_torchvision() -> bool:
    """Whether it is installed, in the environment or in its own folder."""
    return FOLDER.is_dir() or find_spec('torchvision') is not None


def import_torchvision() -> None:
    """Import it, with operators of this file if its own do not load.

    FOLDER must be in PYTHONPATH.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if 'torchvision::nms' not in str(error):
            raise
    else:
        return
    for name in [n for n in sys.modules if f'{n}.'.startswith('torchvision.')]:
        del sys.modules[name]
    signature = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
    torch.library.define('torchvision::nms', signature)
    torch.library.impl('torchvision::nms', 'CPU', nms)
    # described in its import, called by nothing here
    torch.library.define('torchvision::qnms', signature)
    import torchvision.extension

    # Without operators torchvision takes a roi_align in Python and compiles
    # it, which takes longer than a test.
    sys.modules['torchvision.ops.roi_align']._roi_align = roi_align
    # nms asks for operators first: there is the one that it calls.
    torchvision.extension._has_ops = lambda: True


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that no better box covers, best first."""
    from torchvision.ops import box_iou

    order = scores.argsort(descending=True, stable=True)
    covers = box_iou(boxes[order], boxes[order]) > iou_threshold
    kept = torch.ones(len(order), dtype=torch.bool)
    for index in range(len(order)):
        if kept[index]:
            kept[index + 1 :] &= ~covers[index, index + 1 :]
    return order[kept]


def roi_align(
    features: Tensor,
    rois: Tensor,
    spatial_scale: float,
    height: int,
    width: int,
    samples: int,
    aligned: bool,
) -> Tensor:
    """Means of samples x samples points in each bin of each box.

    Boxes lie within their images and are sorted by them.
    """
    assert samples > 0 and not aligned
    start, end = (rois[:, 1:] * spatial_scale).split(2, dim=1)  # (x, y)
    size = (end - start).clamp(min=1)
    pooled = [features.new_zeros(0, features.shape[1], height, width)]
    for image in rois[:, 0].int().unique().tolist():
        mine = rois[:, 0] == image
        axes = []  # from -1, the first pixel, to 1, the last one
        for axis, bins in enumerate((width, height)):
            steps = (torch.arange(bins * samples) + 0.5) / (bins * samples)
            pixels = start[mine, axis, None] + size[mine, axis, None] * steps
            axes.append(pixels * 2 / (features.shape[3 - axis] - 1) - 1)
        x, y = torch.broadcast_tensors(axes[0][:, None], axes[1][:, :, None])
        # all boxes below one another
        points = functional.grid_sample(
            features[image, None],
            torch.stack([x, y], dim=-1).flatten(0, 1)[None],
            padding_mode='border',
            align_corners=True,
        )
        means = functional.avg_pool2d(points, samples)[0]
        pooled.append(means.unflatten(1, (-1, height)).transpose(0, 1))
    return torch.cat(pooled)
