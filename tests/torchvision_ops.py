"""Imports torchvision beside a torch that its compiled operators do not fit.

PyPI's torchvision is built for PyPI's torch, with CUDA. Beside torch for CPUs
its library does not load, and ``import torchvision`` fails.
"""

import sys
from pathlib import Path

import torch

#: Where setup_env.sh puts torchvision: MMEngine, which tries to import it in
#: every run, does not survive one that fails.
FOLDER = Path(sys.prefix) / 'torchvision'


def import_torchvision() -> None:
    """Import it, with ``nms`` and ``roi_align`` in Python if they must be."""
    sys.path.append(str(FOLDER))
    try:
        import torchvision
    except RuntimeError as error:
        if 'torchvision::nms' not in str(error):
            raise
    else:
        return
    for name in [n for n in sys.modules if n.startswith('torchvision')]:
        del sys.modules[name]
    arguments = 'Tensor dets, Tensor scores, float iou_threshold'
    torch.library.define('torchvision::nms', f'({arguments}) -> Tensor')
    torch.library.impl('torchvision::nms', 'CPU', nms)
    # its import describes this one, which nothing here calls
    torch.library.define('torchvision::qnms', f'({arguments}) -> Tensor')
    import torchvision.extension

    # Without operators torchvision takes a roi_align of its own in Python. It
    # compiles that one, which takes longer than these tests: undone here.
    module = sys.modules['torchvision.ops.roi_align']
    module._roi_align = module._roi_align.__wrapped__
    # nms asks whether there are operators; now there is the one it needs
    torchvision.extension._has_ops = lambda: True


def nms(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """Indices of the boxes that no better one covers, best first."""
    from torchvision.ops import box_iou

    order = scores.argsort(descending=True, stable=True)
    covers = box_iou(boxes[order], boxes[order]) > iou_threshold
    kept = torch.ones(len(order), dtype=torch.bool)
    for index in range(len(order)):
        if kept[index]:
            kept[index + 1 :] &= ~covers[index, index + 1 :]
    return order[kept]
