"""Measures memory and time of data-parallel and of sharded training.

mmdet's Cascade R-CNN X101, with 127 million parameters, trains with AdamW on
small random images. It trains on 1, 2 and 4 ranks, data-parallel and in shards
(FullyShardStrategy's units), without AGVM and with it. With AGVM, measured and
unmeasured updates are timed.
"""

import argparse
import time
from typing import Any, Dict, Iterator, List, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.benchmark_models import build_model, make_data
from benchmarks.counters import Profile
from benchmarks.launch import launch
from benchmarks.outputs import add_outputs, write
from mmagvm.analysis.markdown import size, table
from mmagvm.core import AGVM, Settings, module_groups
from mmagvm.core.grad_variance.parts import local_part
from mmagvm.engine.shard_units import find_units

MODEL = 'mmdet::cascade_rcnn/cascade-rcnn_x101-64x4d_fpn_1x_coco.py'
WAYS = ('data-parallel', 'in shards')
KINDS = ('plain', 'not measured', 'measured')
FLOAT = 4
#: Boxes for the heads, few to suit small images.
PROPOSALS = 32


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', default=MODEL, help='config of mmdet')
    parser.add_argument('--ranks', type=int, nargs='+', default=[1, 2, 4])
    parser.add_argument('--image-size', type=int, default=128)
    parser.add_argument(
        '--repetitions', type=int, default=3, help='of each kind of update'
    )
    add_outputs(parser)
    return parser.parse_args()


class Training:
    """A detector in training, data-parallel or in shards.

    Args:
        way: One of WAYS.
        settings: What is asked for.
        device: Of this rank.
    """

    def __init__(
        self, way: str, settings: Dict[str, Any], device: torch.device
    ) -> None:
        torch.manual_seed(0)
        model, _ = build_model(settings['model'])
        for cfg in (model.rpn_head.train_cfg, *model.roi_head.train_cfg):
            if 'sampler' in cfg:
                cfg.sampler.num = PROPOSALS
        self.model = model.to(device).train()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.wrapped: nn.Module = self.model
        if way == WAYS[1]:
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            for name in find_units(model):
                fully_shard(model.get_submodule(name), mesh=mesh)
            fully_shard(model, mesh=mesh)
        elif dist.get_world_size() > 1:
            self.wrapped = DistributedDataParallel(
                self.model, broadcast_buffers=False
            )
        self.optimizer = torch.optim.AdamW(module_groups(model), lr=1e-6)
        self.micro_batches = 1 if dist.get_world_size() > 1 else 2
        self.image_size = settings['image_size']
        self.agvm: Optional[AGVM] = None
        self.number = 0

    def measure_every_second(self) -> None:
        """Switch AGVM on, from now on."""
        self.agvm = AGVM(
            self.optimizer,
            self.wrapped,
            Settings(interval=2),
            self.micro_batches,
        )

    def forward(self) -> Tensor:
        """The loss of one image, divided by the number of micro-batches."""
        data = make_data(self.image_size, 10 * self.number + dist.get_rank())
        data = self.model.data_preprocessor(data, training=True)
        losses = self.wrapped(**data, mode='loss')
        loss: Tensor = self.model.parse_losses(losses)[0]
        return loss / self.micro_batches

    def update(self) -> float:
        """Seconds of an update."""
        self.number += 1
        torch.manual_seed(self.number)  # of the samplers of boxes
        dist.barrier()
        begin = _clock()
        for _ in range(self.micro_batches):
            if self.agvm is None:
                self.forward().backward()
                continue
            with self.agvm.micro_batch():
                self.forward().backward()
        if self.agvm is None:
            self.optimizer.step()
        else:
            self.agvm.step()
        took = _clock() - begin
        self.optimizer.zero_grad()
        return took

    def resident(self) -> int:
        """Bytes of this rank's parameters and of the optimizer's state."""
        found = [
            *self.model.parameters(),
            *_tensors(dict(self.optimizer.state)),
        ]
        return sum(local_part(tensor).nbytes for tensor in found)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(training: Training, repetitions: int) -> Dict[str, Any]:
    """Times, memory and bytes of each kind of update."""
    training.update()  # makes buffers and the optimizer's state
    seconds: Dict[str, List[float]] = {kind: [] for kind in KINDS}
    profiles: Dict[str, Profile] = {}
    for kind in KINDS[:1]:
        for _ in range(repetitions):
            seconds[kind].append(training.update())
        with Profile() as profiles[kind]:
            training.update()
    training.measure_every_second()
    for _ in range(2):  # AGVM's first measurement makes buffers, too
        training.update()
    for _ in range(repetitions):
        seconds['measured'].append(training.update())
        seconds['not measured'].append(training.update())
    for kind in ('measured', 'not measured'):
        with Profile() as profiles[kind]:
            training.update()
    resident = training.resident()
    return dict(
        parameters=training.parameters,
        resident=resident,
        seconds={k: float(np.median(v)) for k, v in seconds.items()},
        peak={k: resident + v.peak_bytes for k, v in profiles.items()},
        sent={k: FLOAT * v.elements for k, v in profiles.items()},
    )


def measure_rank(
    rank: int, device: torch.device, way: str, settings: Dict[str, Any]
) -> Dict[str, Any]:
    """The work of one rank."""
    return measure(Training(way, settings, device), settings['repetitions'])


def row(ranks: int, way: str, found: Dict[str, Any]) -> List[str]:
    """Of the table."""
    plain = found['seconds']['plain']
    return [
        f'{ranks}, {way}',
        size(found['resident']),
        size(found['peak']['plain']),
        size(found['peak']['measured']),
        f'{plain:.2f}',
        *(f'{found["seconds"][kind] / plain:.2f}' for kind in KINDS[1:]),
        *(size(found['sent'][kind]) for kind in ('plain', 'measured')),
    ]


def main() -> None:
    args = parse_args()
    settings = dict(
        model=args.model,
        image_size=args.image_size,
        repetitions=args.repetitions,
    )
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    results: Dict[str, Any] = {}
    rows = []
    for ranks in args.ranks:
        for way in WAYS[: 1 if ranks == 1 else 2]:
            found, *_ = launch(
                measure_rank, ranks, way, settings, device=device
            )
            results[f'{ranks}, {way}'] = found
            rows.append(row(ranks, way, found))
            print(rows[-1], flush=True)
    header = ['ranks', 'weights and state', 'peak', 'peak, measured']
    header += ['s per plain update', 'not measured', 'measured']
    header += ['sent, plain', 'sent, measured']
    text = table(header, rows)
    write(args, 'shard cost', text, results=results, **settings)


if __name__ == '__main__':
    main()
