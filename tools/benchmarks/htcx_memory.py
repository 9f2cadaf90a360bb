"""Counts parameters of HTC-X with UniNet-G, and runs it with few blocks.

The whole detector is built on torch's meta device. One forward and backward
pass runs on this machine, with all parts at full width, but stages of three
blocks. torch's profiler counts its memory.
"""

import argparse
import copy
import time
from collections import Counter
from pathlib import Path
from typing import Any, Dict, List

import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope

import mmagvm.models  # noqa: F401  registers UniNet and the heads
from benchmarks.counters import Profile
from mmagvm.analysis.markdown import fill, size, table
from mmagvm.core import find_modules
from mmagvm.models.uninet import ARCHS

ROOT = Path(__file__).resolve().parents[2]
CONFIG = (
    ROOT / 'configs/htc_x/htc-x-mask_uninet-g_480xb2-agvm-adamw-11e_coco.py'
)
#: Bytes of a parameter: weight, gradient and AdamW's two moments in fp32.
BYTES = 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--depth', type=int, default=3, help='most blocks of a stage'
    )
    parser.add_argument('--image-size', type=int, default=512)
    parser.add_argument(
        '--markdown', type=Path, help='page to write the table into'
    )
    return parser.parse_args()


def parameters(model: BaseModel) -> Dict[str, int]:
    """By module, as AGVM finds them."""
    modules = find_modules(model)
    found: Counter[str] = Counter()
    for name, param in model.named_parameters():
        module = next(m for m in modules if name.startswith(f'{m}.'))
        found[module] += param.numel()
    return {module: found[module] for module in modules}


def shortened(cfg: Any, depth: int) -> Any:
    """The model's config with fewer blocks, to suit a CPU."""
    cfg = copy.deepcopy(cfg)
    cfg.backbone.arch = dict(
        ARCHS['G'],
        stages=[
            dict(stage, depth=min(depth, stage['depth']))
            for stage in ARCHS['G']['stages']
        ],
    )
    batch_norm = dict(type='BN')  # SyncBN needs a GPU
    for part in (cfg.backbone, *cfg.neck):
        part.norm_cfg = batch_norm
    cfg.train_cfg.rpn_proposal.max_per_img = 64
    for stage in cfg.train_cfg.rcnn:
        stage.sampler.num = 16
    return cfg


def run(model: BaseModel, side: int) -> float:
    """Seconds of a forward and backward pass of an image with three boxes."""
    data = demo_mm_inputs(
        1,
        image_shapes=[(3, side, side)],
        num_items=[3],
        num_classes=80,
        with_mask=True,
        with_semantic=False,
    )
    begin = time.perf_counter()
    data = model.data_preprocessor(data, training=True)
    losses = model(**data, mode='loss')
    model.parse_losses(losses)[0].backward()
    return time.perf_counter() - begin


def main() -> None:
    args = parse_args()
    init_default_scope('mmdet')
    cfg = Config.fromfile(CONFIG).model
    with torch.device('meta'):
        whole = parameters(MODELS.build(copy.deepcopy(cfg)))
    rows: List[List[str]] = [
        [module, f'{count / 1e6:.1f} M', size(BYTES * count)]
        for module, count in whole.items()
    ]
    total = sum(whole.values())
    rows.append(['all', f'{total / 1e6:.1f} M', size(BYTES * total)])
    model = MODELS.build(shortened(cfg, args.depth)).train()
    with Profile() as seen:
        seconds = run(model, args.image_size)
    count = sum(parameters(model).values())
    text = table(['module', 'parameters', 'fp32, AdamW'], rows)
    text += (
        f'\n\nAt full width, with at most {args.depth} blocks in a stage '
        f'({count / 1e6:.1f} M parameters), a forward and backward pass of an '
        f'image of {args.image_size} x {args.image_size} takes '
        f'{seconds:.1f} s on {torch.get_num_threads()} CPU threads, and '
        f'{size(seen.peak_bytes)} beyond the weights, gradients included.'
    )
    print(text)
    if args.markdown:
        fill(args.markdown, 'htcx memory', text)


if __name__ == '__main__':
    main()
