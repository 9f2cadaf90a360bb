"""Makes what all runs of the study start from: data and a backbone."""

import json
from pathlib import Path
from typing import Any, Dict, Mapping

import numpy as np
import torch
from mmdet.models import ResNet
from mmengine.logging import MMLogger
from sklearn.datasets import load_digits
from torch import nn

from mmagvm.datasets.digits import draw_background, draw_digit, make_split

SPLITS = ('train', 'tune', 'test')


def make_data(study: Mapping[str, Any]) -> None:
    """Draw the splits that are not there yet.

    Raises:
        SystemExit: What is there was made for another declaration.
    """
    data = study['data']
    root = Path(data['root'])
    root.mkdir(parents=True, exist_ok=True)
    declared = json.dumps([data, study['pretraining'], pretrained(study)])
    note = root / 'declaration.json'
    if not note.is_file() and not any(root.iterdir()):
        note.write_text(declared)
    if not note.is_file() or note.read_text() != declared:
        raise SystemExit(
            f'data.root {root}: what is there was made for another '
            'declaration: remove it, or name another folder'
        )
    for number, split in enumerate(SPLITS):
        # written last
        if not (root / f'annotations/panoptic_{split}.json').is_file():
            make_split(
                root,
                split,
                data[split]['images'],
                [data['seed'], number],
                slice(*data[split]['scans']),
            )


def pretrained(study: Mapping[str, Any]) -> Dict[str, Any]:
    """The backbone's options, without those of a detector's training."""
    options = dict(study['models']['faster_rcnn']['model'][0]['backbone'])
    options['frozen_stages'] = -1  # a detector freezes what was trained here
    return options


def pretrain(study: Mapping[str, Any]) -> float:
    """Classify single digits of the training scans, unless that was done.

    Writes ``backbone.pth`` for a backbone's ``init_cfg``.

    Returns:
        Share of the tuning scans that are classified rightly, or NaN if the
        backbone was there.
    """
    file = Path(study['data']['root']) / 'backbone.pth'
    if file.is_file():
        return float('nan')
    MMLogger.get_instance('mmengine', log_level='WARNING')  # of init_weights
    settings = study['pretraining']
    torch.manual_seed(study['data']['seed'])
    rng = np.random.default_rng([study['data']['seed'], len(SPLITS)])
    backbone = ResNet(**pretrained(study))
    backbone.init_weights()
    classifier = nn.LazyLinear(10)
    model = nn.ModuleList([backbone, classifier])
    classify(backbone, classifier, *draw(study, 'train', 2, rng))
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings['lr'],
        momentum=0.9,
        weight_decay=1e-4,
    )
    steps = settings['images'] // settings['batch_size']
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings['lr'], total_steps=steps
    )
    for _ in range(steps):
        images, labels = draw(study, 'train', settings['batch_size'], rng)
        loss, _ = classify(backbone, classifier, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        _, right = classify(
            backbone, classifier, *draw(study, 'tune', 500, rng)
        )
    part = file.with_suffix('.part')
    torch.save(dict(state_dict=backbone.state_dict()), part)
    part.replace(file)  # never half of it
    return float(right)


def classify(
    backbone: nn.Module,
    classifier: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> Any:
    """Loss, and share of images classified rightly."""
    scores = classifier(backbone(images)[-1].mean(dim=(2, 3)))
    right = (scores.argmax(dim=1) == labels).float().mean()
    return nn.functional.cross_entropy(scores, labels), right


def draw(
    study: Mapping[str, Any], split: str, count: int, rng: np.random.Generator
) -> Any:
    """(count, 3, 32, 32) images of one digit each, and its labels."""
    digits = load_digits()
    first, end = study['data'][split]['scans']
    images, labels = [], []
    for index in rng.integers(first, end, count):
        image = draw_background(rng)[:32, :32]
        ink = draw_digit(digits.images[index], int(rng.integers(14, 31)))
        ink = ink[:, :32]
        height, width = ink.shape
        y = rng.integers(32 - height + 1)
        x = rng.integers(32 - width + 1)
        colour = rng.choice([rng.uniform(0, 40), rng.uniform(215, 255)])
        patch = image[y : y + height, x : x + width]
        patch += ink[..., None] * (colour - patch)
        images.append((image + rng.normal(0, 6, image.shape)).clip(0, 255))
        labels.append(digits.target[index])
    pixels = torch.tensor(np.stack(images), dtype=torch.float32)
    return (pixels.permute(0, 3, 1, 2) - 127) / 64, torch.tensor(labels)
