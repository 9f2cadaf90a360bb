"""Measures what optimizers cost on mmdet's real models.

Measures the time of the first step, of a usual one and, for SOAP, of one that
renews its bases. Also measures bytes of state, and the share of an update with
a forward and backward pass of one image. Gradients of the steps are random.
With several ranks the matrix work of SOAP and Muon is shared.
"""

import argparse
import os
import time
from typing import Any, Dict, Iterator, List

import numpy as np
import torch
import torch.distributed as dist
from mmdet.testing import demo_mm_inputs
from mmengine.model import BaseModel
from mmengine.registry import OPTIMIZERS
from torch import Tensor, nn

import mmagvm  # noqa: F401  registers SOAP and Muon
from benchmarks.benchmark_models import build_model
from benchmarks.launch import launch
from benchmarks.outputs import add_outputs, write
from mmagvm.analysis.markdown import size, table

MODELS = {
    'Faster R-CNN R50': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'Mask R-CNN Swin-T': ('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'),
    'Mask2Former R50': (
        'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'
    ),
}
#: Every second step of SOAP renews its bases here.
RENEWAL = 2
OPTIMIZER_CONFIGS: Dict[str, Dict[str, Any]] = dict(
    SGD=dict(type='SGD', momentum=0.9),
    AdamW=dict(type='AdamW'),
    SOAP=dict(type='SOAP', precondition_frequency=RENEWAL),
    Muon=dict(type='Muon'),
)
#: Steps between two renewals of bases, for the average cost.
FREQUENCY = 5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--models', nargs='+', default=list(MODELS), choices=list(MODELS)
    )
    parser.add_argument(
        '--optimizers',
        nargs='+',
        default=list(OPTIMIZER_CONFIGS),
        choices=list(OPTIMIZER_CONFIGS),
    )
    parser.add_argument('--ranks', type=int, nargs='+', default=[1, 2])
    parser.add_argument(
        '--repetitions', type=int, default=2, help='of each kind of step'
    )
    parser.add_argument('--image-size', type=int, nargs=2, default=[800, 1333])
    add_outputs(parser)
    return parser.parse_args()


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors within an optimizer's state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors(part)


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_steps(
    model: nn.Module, config: Dict[str, Any], repetitions: int
) -> Dict[str, Any]:
    """Seconds of every kind of step, and bytes of state."""
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = OPTIMIZERS.build(dict(config, params=params, lr=1e-6))
    generator = torch.Generator(params[0].device).manual_seed(0)
    renews = config['type'] == 'SOAP'
    # the first, a second that allocates, and then each kind in turn
    count = 2 + repetitions * (RENEWAL if renews else 1)
    seconds = []
    for _ in range(count):
        for param in params:
            param.grad = torch.empty_like(param).normal_(generator=generator)
        if dist.is_initialized():
            dist.barrier()
        started = clock()
        optimizer.step()
        seconds.append(clock() - started)
    # SOAP's step number 1 + k renews if RENEWAL divides k
    usual = seconds[3::RENEWAL] if renews else seconds[2:]
    found = dict(
        first=seconds[0],
        usual=float(np.median(usual)),
        state=sum(t.nbytes for t in tensors(dict(optimizer.state))),
    )
    if renews:
        found['renewal'] = float(np.median(seconds[2::RENEWAL]))
    return found


def time_passes(model: BaseModel, shape: List[int], repetitions: int) -> float:
    """Seconds of forward and backward of one image with three objects."""
    seconds = []
    # models that pad to a fixed size take no larger images
    largest = [
        augment.size
        for augment in model.data_preprocessor.batch_augments or ()
        if hasattr(augment, 'size')
    ]
    shape = [min(sides) for sides in zip(shape, *largest)]
    for _ in range(1 + repetitions):
        data = demo_mm_inputs(
            1,
            image_shapes=[(3, *shape)],
            num_items=[3],
            num_classes=80,
            with_mask=True,
            with_semantic=False,
        )
        model.zero_grad()
        started = clock()
        data = model.data_preprocessor(data, training=True)
        losses = model(**data, mode='loss')
        model.parse_losses(losses)[0].backward()
        seconds.append(clock() - started)
    return float(np.median(seconds[1:]))


def measure(
    rank: int, device: torch.device, settings: Dict[str, Any]
) -> Dict[str, Any]:
    """The work of one rank, by model."""
    ranks = dist.get_world_size()
    found: Dict[str, Any] = {}
    for name in settings['models']:
        model = build_model(MODELS[name])[0].to(device).train()
        steps = {}
        for optimizer in settings['optimizers']:
            steps[optimizer] = time_steps(
                model, OPTIMIZER_CONFIGS[optimizer], settings['repetitions']
            )
            if rank == 0:
                print(f'{ranks} ranks, {name}, {optimizer}: ', end='')
                print(steps[optimizer], flush=True)
        found[name] = dict(
            parameters=sum(p.numel() for p in model.parameters()),
            passes=time_passes(
                model, settings['image_size'], settings['repetitions']
            ),
            steps=steps,
        )
    return found


def rows(ranks: str, found: Dict[str, Any]) -> Iterator[List[str]]:
    """Of the table, for some number of ranks."""
    for name, part in found.items():
        for optimizer, step in part['steps'].items():
            renewal = step.get('renewal')
            mean = step['usual']
            if renewal is not None:
                mean += (renewal - step['usual']) / FREQUENCY
            yield [
                f'{name}, {part["parameters"] / 1e6:.0f} M',
                ranks,
                optimizer,
                f'{step["first"]:.2f}',
                f'{step["usual"]:.2f}',
                '-' if renewal is None else f'{renewal:.2f}',
                size(step['state']),
                f'{part["passes"]:.1f}',
                f'{100 * mean / (mean + part["passes"]):.0f} %',
            ]


def main() -> None:
    args = parse_args()
    settings = dict(
        models=args.models,
        optimizers=args.optimizers,
        repetitions=args.repetitions,
        image_size=args.image_size,
    )
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    results = {}
    for ranks in args.ranks:
        threads = max(1, (os.cpu_count() or 1) // ranks)
        found, *_ = launch(
            measure, ranks, settings, device=device, threads=threads
        )
        results[str(ranks)] = found
    header = ['model', 'ranks', 'optimizer', 'first step', 'usual step']
    header += ['with renewal', 'state', 'passes of an image', 'share']
    text = table(header, [r for k, v in results.items() for r in rows(k, v)])
    write(args, 'optimizer cost', text, ranks=results, **settings)


if __name__ == '__main__':
    main()
