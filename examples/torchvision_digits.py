"""AGVM in a loop of your own: torchvision's Faster R-CNN on drawn digits.

    torchrun --nproc_per_node 2 examples/torchvision_digits.py

Resumes from its checkpoint, if there is one. Five lines add AGVM.
"""

import argparse
import os
from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.detection import FasterRCNN, faster_rcnn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import box_convert

from mmagvm.core import AGVM, Settings, module_groups  # AGVM 1
from mmagvm.datasets.digits import draw_image

#: The modules; the others follow the first one.
MODULES = ('backbone.body', 'backbone.fpn', 'rpn', 'roi_heads')
IMAGES = 8  # of a rank in a micro-batch
ACCUMULATION = 2  # micro-batches in an update
DIGITS = load_digits()


def draw_batch(
    seed: Tuple[int, int], device: str
) -> Tuple[List[Tensor], List[Dict[str, Tensor]]]:
    """Images and targets as torchvision takes them, the same for a seed."""
    rng = np.random.default_rng(seed)
    images, targets = [], []
    for _ in range(IMAGES):
        image, boxes, labels, _ = draw_image(DIGITS.images, DIGITS.target, rng)
        corners = box_convert(torch.tensor(boxes).float(), 'xywh', 'xyxy')
        classes = torch.tensor(labels) + 1  # 0 is the background
        pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
        images.append(pixels.to(device))
        targets.append(
            dict(boxes=corners.to(device), labels=classes.to(device))
        )
    return images, targets


def build_model() -> FasterRCNN:
    """torchvision's detector, small enough for two CPU cores."""
    body = ResNet(BasicBlock, [1, 1, 1, 1])
    levels = dict(layer1='0', layer2='1', layer3='2')
    return FasterRCNN(
        BackboneWithFPN(body, levels, [64, 128, 256], out_channels=64),
        rpn_anchor_generator=AnchorGenerator(
            ((8,), (16,), (32,), (64,)), ((1.3,),) * 4
        ),
        box_head=faster_rcnn.TwoMLPHead(64 * 7 * 7, 256),
        box_predictor=faster_rcnn.FastRCNNPredictor(256, 11),
        **dict(min_size=96, max_size=96, box_batch_size_per_image=32),
        **dict(rpn_pre_nms_top_n_train=100, rpn_post_nms_top_n_train=50),
    )


def main() -> None:
    """Train, on every rank that torchrun starts."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--iterations', type=int, default=400)
    parser.add_argument('--warmup', type=int, default=40, help='updates')
    parser.add_argument('--every', type=int, default=20, help='updates')
    parser.add_argument('--checkpoint', type=Path, default='digits.pth')
    args = parser.parse_args()
    device = 'cpu'
    if torch.cuda.is_available():
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(device)
    dist.init_process_group('gloo' if device == 'cpu' else 'nccl')
    rank = dist.get_rank()

    torch.manual_seed(0)
    model = build_model().to(device)
    ddp = DistributedDataParallel(model)
    groups = module_groups(model, MODULES)  # AGVM 2: for model.parameters()
    optimizer = torch.optim.SGD(groups, lr=0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, 0.01, total_iters=args.warmup
    )
    settings = Settings(anchor=MODULES[0], begin=args.warmup, interval=2)
    agvm = AGVM(optimizer, ddp, settings, ACCUMULATION)  # AGVM 3
    state: Dict[str, Any] = dict(
        model=model, optimizer=optimizer, schedule=schedule, agvm=agvm
    )
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint, device, weights_only=True)
        for name, part in state.items():
            part.load_state_dict(saved[name])
        if rank == 0:
            print(f'resumes after update {agvm.update}', flush=True)

    losses = []
    for iteration in range(agvm.update * ACCUMULATION, args.iterations):
        with agvm.micro_batch():  # AGVM 4: around forward and backward
            parts = ddp(*draw_batch((iteration, rank), device))
            loss = sum(parts.values()) / ACCUMULATION
            loss.backward()
        losses.append(loss.item() * ACCUMULATION)
        if not agvm.step(max_norm=10):  # AGVM 5: measures, clips, steps
            continue
        optimizer.zero_grad()
        schedule.step()
        if rank == 0 and agvm.update % args.every == 0:
            logged = agvm.scalars()
            scales = [
                f'{m} {logged[f"agvm_lr_scale/{m}"]:.3f}' for m in MODULES
            ]
            print(
                f'update {agvm.update}: loss {np.mean(losses):.3f}, '
                f'lr {schedule.get_last_lr()[0]:.4f} x {", ".join(scales)}',
                flush=True,
            )
            losses.clear()
            torch.save(
                {name: part.state_dict() for name, part in state.items()},
                args.checkpoint,
            )
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
