"""Per-sample gradients of the quickstart detector at one weight vector."""

import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

import mmagvm  # noqa: F401  lets torch >= 2.6 load checkpoints
from mmagvm.core.modules import find_modules

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/quickstart/faster-rcnn_r18_fpn_2xb8-agvm-4e_digits.py'


def build(config: Path, data: Path) -> Tuple[BaseModel, Any]:
    """The model and its training data, drawn first if missing."""
    register_all_modules(init_default_scope=True)
    MMLogger.get_current_instance().setLevel('WARNING')
    if not (data / 'annotations/train.json').exists():
        print(f'drawing the data set into {data}', flush=True)
        subprocess.run(
            [
                sys.executable,
                ROOT / 'tools/dataset_converters/digits2coco.py',
                data,
            ],
            check=True,
        )
    cfg = Config.fromfile(str(config))
    cfg.train_dataloader.dataset.data_root = f'{data}/'
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model.train(), DATASETS.build(cfg.train_dataloader.dataset)


def batches(
    dataset: Any, images: int, generator: torch.Generator
) -> Iterator[Dict[str, Any]]:
    """The data set in random order, once, as a data loader gives it."""
    order = torch.randperm(len(dataset), generator=generator).tolist()
    for start in range(0, len(order) - images + 1, images):
        yield pseudo_collate([dataset[i] for i in order[start:][:images]])


def loss_of(model: BaseModel, batch: Dict[str, Any]) -> Tensor:
    """As ``train_step`` of MMEngine computes it."""
    data = model.data_preprocessor(batch, training=True)
    loss: Tensor = model.parse_losses(model(**data, mode='loss'))[0]
    return loss


def reach_weights(
    model: BaseModel, dataset: Any, checkpoint: Optional[Path], updates: int
) -> str:
    """Load a checkpoint or, if None, train by plain SGD for a while.

    Returns:
        Where the weights are from.
    """
    if checkpoint is not None:
        load_checkpoint(model, str(checkpoint), map_location='cpu')
        return str(checkpoint)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4
    )
    generator = torch.Generator().manual_seed(1)
    done = 0
    while done < updates:
        for batch in batches(dataset, 16, generator):
            if done == updates:
                break
            optimizer.param_groups[0]['lr'] = 0.02 * min(1, (done + 1) / 60)
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10)
            optimizer.step()
            done += 1
            if done % 50 == 0:
                print(
                    f'warming up: update {done} of {updates}, '
                    f'loss {loss.item():.3f}',
                    flush=True,
                )
    return f'{updates} updates of plain SGD from random weights'


def record(
    model: BaseModel, dataset: Any, samples: int, images: int
) -> Dict[str, Tensor]:
    """Gradients of ``samples`` batches of ``images`` images, no image twice.

    Returns:
        (samples, d_i) in float32, for each module.

    Raises:
        SystemExit: The data set is too small.
    """
    if samples * images > len(dataset):
        raise SystemExit(
            f'{samples} samples of {images} images need {samples * images} '
            f'images, but the data set has {len(dataset)}: set --samples or '
            '--images to less'
        )
    params: Dict[str, List[Tensor]] = {
        name: [
            p
            for p in model.get_submodule(name).parameters()
            if p.requires_grad
        ]
        for name in find_modules(model)
    }
    rows: Dict[str, List[Tensor]] = {name: [] for name in params}
    generator = torch.Generator().manual_seed(2)
    for i, batch in zip(range(samples), batches(dataset, images, generator)):
        model.zero_grad()
        loss_of(model, batch).backward()
        for name, module in params.items():
            rows[name].append(
                torch.cat(
                    [
                        (
                            torch.zeros_like(p) if p.grad is None else p.grad
                        ).flatten()
                        for p in module
                    ]
                )
            )
        if (i + 1) % 50 == 0:
            print(f'recorded {i + 1} of {samples} gradients', flush=True)
    return {name: torch.stack(module) for name, module in rows.items()}
