"""AGVM in a loop of your own: torchvision's Faster R-CNN on drawn digits.

    torchrun --nproc_per_node 2 examples/torchvision_digits.py --iterations 400

Goes on from its checkpoint if there is one. Five lines make it AGVM's.
"""

import argparse
import os
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import (
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.resnet import BasicBlock, ResNet

from mmagvm.core import AGVM, Settings, module_groups  # AGVM 1
from mmagvm.datasets.digits import SCANS, draw_image

#: What AGVM tells apart, and the first is the one that the others follow.
MODULES = ('backbone.body', 'backbone.fpn', 'rpn', 'roi_heads')
BATCH_SIZE = 8  # images of a rank in a micro-batch
ACCUMULATION = 2  # micro-batches in an update

Target = Dict[str, torch.Tensor]


class Digits(Dataset[Tuple[torch.Tensor, Target]]):
    """Images drawn on demand, always the same for the same index."""

    def __init__(self, indices: range) -> None:
        self.indices = indices
        self.scans = load_digits()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> Tuple[torch.Tensor, Target]:
        images, labels = self.scans.images, self.scans.target
        rng = np.random.default_rng(self.indices[item])
        image, boxes, found, _ = draw_image(
            images[SCANS['train']], labels[SCANS['train']], rng
        )
        corners = [(x, y, x + w, y + h) for x, y, w, h in boxes]
        return torch.from_numpy(image).permute(2, 0, 1) / 255, dict(
            boxes=torch.tensor(corners, dtype=torch.float32),
            labels=torch.tensor(found) + 1,  # 0 is the background
        )


def build_model() -> FasterRCNN:
    """torchvision's detector, small enough for two CPU cores."""
    strides = dict(layer1='0', layer2='1', layer3='2')
    body = ResNet(BasicBlock, [1, 1, 1, 1])
    return FasterRCNN(
        BackboneWithFPN(body, strides, [64, 128, 256], out_channels=64),
        rpn_anchor_generator=AnchorGenerator(
            ((8,), (16,), (32,), (64,)), ((1.3,),) * 4
        ),
        box_head=TwoMLPHead(64 * 7 * 7, 256),
        box_predictor=FastRCNNPredictor(256, 11),
        min_size=96,
        max_size=96,
        rpn_pre_nms_top_n_train=100,
        rpn_post_nms_top_n_train=50,
        box_batch_size_per_image=32,
    )


def main() -> None:
    """Train on every rank that torchrun starts."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--iterations', type=int, default=400)
    parser.add_argument('--warmup', type=int, default=30, help='updates')
    parser.add_argument('--every', type=int, default=20, help='updates')
    parser.add_argument('--checkpoint', type=Path, default='digits.pth')
    args = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')

    torch.manual_seed(0)
    model = build_model().to(device)
    ddp = DistributedDataParallel(model)
    groups = module_groups(model, MODULES)  # AGVM 2, for model.parameters()
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LinearLR(
        optimizer, 0.01, total_iters=args.warmup
    )
    settings = Settings(anchor=MODULES[0], begin=args.warmup, interval=2)
    agvm = AGVM(optimizer, ddp, settings, ACCUMULATION)  # AGVM 3
    parts: Dict[str, Any] = dict(
        model=model, optimizer=optimizer, scheduler=scheduler, agvm=agvm
    )
    ...


if __name__ == '__main__':
    main()
