"""Whether versions are the same everywhere, and whether MMCV's ops run."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Dict

import torch

from mmagvm.checks.ranks import Ranks
from mmagvm.checks.result import CheckFailedError, NotApplicableError
from mmagvm.checks.running import Found
from mmagvm.version import full_version

#: Distributions of OpenMMLab and its fork, by the name to import.
PACKAGES = dict(
    mmengine=('mmengine', 'onedl-mmengine'),
    mmcv=('mmcv', 'mmcv-lite', 'onedl-mmcv'),
    mmdet=('mmdet', 'onedl-mmdetection'),
    mmseg=('mmsegmentation', 'onedl-mmsegmentation'),
)


def versions() -> Dict[str, str]:
    """Versions of all packages that training uses."""
    found = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        mmagvm=full_version(),
    )
    for name, distributions in PACKAGES.items():
        for distribution in distributions:
            try:
                found[name] = f'{distribution} {version(distribution)}'
            except PackageNotFoundError:
                continue
    if torch.cuda.is_available():
        found['cuda'] = str(torch.version.cuda)
        found['nccl'] = '.'.join(map(str, torch.cuda.nccl.version()))
        found['gpu'] = torch.cuda.get_device_name()
    return found


def same_versions(ranks: Ranks) -> Found:
    """Whether every rank runs the same software on the same kind of GPU."""
    own = versions()
    first = ranks.gather('versions', own)[0]
    for name in sorted({*own, *first}):
        if own.get(name) != first.get(name):
            raise CheckFailedError(
                f'{name} is {own.get(name)}, but {first.get(name)} on rank 0: '
                'install the same environment on every node'
            )
    places = 'node' if ranks.nodes == 1 else 'nodes'
    return (
        f'{ranks.world_size} x {first.get("gpu", "CPU")} on {ranks.nodes} '
        f'{places}; '
        + ', '.join(
            value if name in PACKAGES else f'{name} {value}'
            for name, value in first.items()
            if name != 'gpu'
        ),
        {},
    )


def mmcv_ops(ranks: Ranks) -> Found:
    """Whether MMCV's compiled operators are installed and correct."""
    device = ranks.device
    try:
        from mmcv.ops import nms, roi_align
    except ImportError as error:
        raise CheckFailedError(
            f'MMCV has no operators ({error}): install mmcv, not mmcv-lite, '
            'built for this torch'
        ) from None
    if device.type not in ('cpu', 'cuda'):
        raise NotApplicableError(f'MMCV has no operators for {device.type}')
    boxes = torch.tensor(
        [[0, 0, 4, 4], [0, 0, 4, 5], [8, 8, 9, 9]], device=device
    ).float()
    scores = torch.tensor([0.5, 0.9, 0.7], device=device)
    try:
        kept = nms(boxes, scores, iou_threshold=0.5)[1].tolist()
        # of a ramp, the middle of a region is its mean
        ramp = torch.arange(8.0, device=device).expand(1, 1, 8, 8)
        roi = torch.tensor([[0, 2, 2, 6, 6]], device=device).float()
        mean = float(roi_align(ramp.contiguous(), roi, 1, 1.0, 2, 'avg', True))
    except (RuntimeError, NotImplementedError) as error:
        raise CheckFailedError(
            f"MMCV's operators do not run on {device.type} ({error}): build "
            'mmcv for this torch and GPU, with MMCV_WITH_OPS=1 and, for GPUs, '
            'FORCE_CUDA=1 and TORCH_CUDA_ARCH_LIST'
        ) from None
    if kept != [1, 2] or abs(mean - 3.5) > 1e-4:
        raise CheckFailedError(
            f'nms keeps boxes {kept} instead of [1, 2] and roi_align gives '
            f'{mean:g} instead of 3.5: build mmcv for this torch and GPU'
        )
    return f'nms and roi_align are correct on {device.type}', {}
