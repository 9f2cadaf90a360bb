"""Memory of known models: weights and states, and activations of an image.

Nothing is computed. Models are on torch's meta device, and the sum is of what
autograd keeps for the backward pass of backbone and neck.
"""

import argparse
from pathlib import Path
from typing import List

import torch
from mmengine.model import BaseModel
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.benchmark_models import build_model
from mmagvm.analysis.markdown import fill, size, table

MODELS = {
    'Faster R-CNN R50': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'Mask R-CNN Swin-S': 'mmdet::swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-'
    '3x_coco.py',
    'Cascade R-CNN X101 64x4d': 'mmdet::cascade_rcnn/cascade-rcnn_x101-64x4d_'
    'fpn_1x_coco.py',
    'DINO Swin-L': 'mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py',
    'Mask2Former Swin-L': 'mmdet::mask2former/mask2former_swin-l-p4-w12-384-'
    'in21k_16xb1-lsj-100e_coco-panoptic.py',
}
#: Bytes of each parameter in fp32: weight, gradient, and the optimizer's.
BYTES = dict(SGD=4 + 4 + 4, AdamW=4 + 4 + 8)
IMAGE = (800, 1344)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--gpus', type=int, default=8, help='number of shards')
    parser.add_argument(
        '--markdown', type=Path, help='page to write the table into'
    )
    return parser.parse_args()


def activations(model: BaseModel) -> int:
    """Bytes that the backward pass of an image's features needs, in fp32."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            kept[storage._cdata] = storage
        return tensor

    image = torch.empty(1, 3, *IMAGE, device='meta', requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model.extract_feat(image)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    return sum(
        storage.nbytes() for key, storage in kept.items() if key not in weights
    )


def row(name: str, gpus: int) -> List[str]:
    """Of the table."""
    model = build_model(MODELS[name])[0].to('meta')
    count = sum(p.numel() for p in model.train().parameters())
    return [
        f'{name}, {count / 1e6:.0f} M',
        *(size(count * cost) for cost in BYTES.values()),
        *(size(count * cost / gpus) for cost in BYTES.values()),
        size(activations(model)),
    ]


def main() -> None:
    args = parse_args()
    header = [
        'model',
        *BYTES,
        *(f'{name}, {args.gpus} shards' for name in BYTES),
    ]
    header.append('features of an image')
    text = table(header, [row(name, args.gpus) for name in MODELS])
    print(text)
    if args.markdown:
        fill(args.markdown, 'model memory', text)


if __name__ == '__main__':
    main()
