"""What one rank of the benchmark does: the same update in every variant."""

import time
from contextlib import ExitStack
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.distributed as dist
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.optim import OptimWrapper, build_optim_wrapper

from benchmarks.benchmark_models import build_detector, make_data
from benchmarks.counters import CollectiveBytes, HostReads, Profile
from benchmarks.published_pattern import PublishedPattern, modules_of
from mmagvm.core.modules import find_modules

#: Variants in the order of the tables. The second plain one is the control:
#: its difference to the first is noise.
PLAIN, CONTROL, PUBLISHED = 'plain', 'plain again', 'published pattern'
ESTIMATORS = ('split', 'pairs')
VARIANTS = (PLAIN, CONTROL, *ESTIMATORS, PUBLISHED)
#: Every second update is measured, so a repetition has one of each kind.
INTERVAL = 2
KINDS = ('measured', 'unmeasured')
#: A rate so small that all variants keep the same weights, thus the same work.
OPTIMIZER = dict(type='SGD', lr=1e-6, momentum=0.9, weight_decay=1e-4)


class Variant:
    """One way to train, with a model of its own.

    Args:
        name: One of VARIANTS.
        make_model: Builds a new model, equal at each call.
        accumulation: Micro-batches in an update.
        device: Where the model is.
    """

    def __init__(
        self,
        name: str,
        make_model: Callable[[], BaseModel],
        accumulation: int,
        device: torch.device,
    ) -> None:
        self.name = name
        model = make_model().to(device)
        self.wrapper = _build_wrapper(name, model, accumulation)
        self.model = model
        if name != PUBLISHED and dist.get_world_size() > 1:
            self.model = MMDistributedDataParallel(
                model,
                device_ids=[device] if device.type == 'cuda' else None,
                broadcast_buffers=False,
            )
        self.trainable = sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )

    def forward(self, data: Dict[str, Any]) -> torch.Tensor:
        """The loss, as ``train_step`` of MMEngine computes it."""
        module = getattr(self.model, 'module', self.model)
        with self.wrapper.optim_context(self.model):
            data = module.data_preprocessor(data, training=True)
            losses = self.model(**data, mode='loss')
        loss: torch.Tensor = module.parse_losses(losses)[0]
        return loss


def _build_wrapper(
    name: str, model: BaseModel, accumulation: int
) -> OptimWrapper:
    cfg = dict(
        type='OptimWrapper',
        optimizer=dict(OPTIMIZER),
        accumulative_counts=accumulation,
    )
    if name in ESTIMATORS:
        cfg.update(
            type='AGVMOptimWrapper',
            constructor='AGVMOptimWrapperConstructor',
            interval=INTERVAL,
            estimator=name,
        )
    wrapper = build_optim_wrapper(model, cfg)
    if name == PUBLISHED:
        wrapper = PublishedPattern(
            modules_of(model, find_modules(model)),
            INTERVAL,
            optimizer=wrapper.optimizer,
        )
    return wrapper


def update(
    variant: Variant,
    data: List[Dict[str, Any]],
    seed: int,
    watch_step: Optional[HostReads] = None,
) -> Tuple[float, float]:
    """One update.

    Args:
        variant: The variant to update.
        data: Of each micro-batch.
        seed: Of the samplers of boxes, so that all variants draw the same.
        watch_step: Entered for all but the forward pass.

    Returns:
        Seconds of the whole update, and of its part after the forward pass.
    """
    torch.manual_seed(seed)
    dist.barrier()
    after_forward = 0.0
    start = _clock()
    for micro_batch in data:
        loss = variant.forward(micro_batch)
        middle = _clock()
        with ExitStack() as stack:
            if watch_step is not None:
                stack.enter_context(watch_step)
            variant.wrapper.update_params(loss)
        end = _clock()
        after_forward += end - middle
    return end - start, after_forward


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def count_update(
    variant: Variant, data: List[Dict[str, Any]], seed: int
) -> Dict[str, Any]:
    """What Python code sends and reads back in one update."""
    reads = HostReads()
    with CollectiveBytes() as sent:
        update(variant, data, seed, reads)
    return dict(
        wrapped_bytes=sent.bytes,
        wrapped_elements=sent.elements,
        wrapped_calls=len(sent.calls),
        reads=reads.reads,
    )


def profile_update(
    variant: Variant, data: List[Dict[str, Any]], seed: int, profiling: bool
) -> Dict[str, int]:
    """What the profiler sees of an update; nothing if not ``profiling``."""
    if not profiling:
        update(variant, data, seed)
        return {}
    with Profile() as seen:
        update(variant, data, seed)
    return dict(
        profiled_elements=seen.elements,
        peak_bytes=seen.peak_bytes,
        device_to_host=seen.device_to_host,
    )


def measure(
    rank: int, device: torch.device, settings: Dict[str, Any]
) -> Dict[str, Any]:
    """Counts and times of every variant, the variants taking turns."""
    accumulation = settings['accumulation']
    variants = [
        Variant(
            name,
            lambda: build_detector(settings['proposals']),
            accumulation,
            device,
        )
        for name in settings['variants']
    ]

    def batch(number: int) -> List[Dict[str, Any]]:
        return [
            make_data(
                settings['image_size'],
                1000 * number + 10 * rank + micro_batch,
            )
            for micro_batch in range(accumulation)
        ]

    counts: Dict[str, Dict[str, Dict[str, Any]]] = {
        v.name: {kind: {} for kind in KINDS} for v in variants
    }
    number = 0
    # DDP rebuilds its buckets after the first backward pass
    for stage in ('warm-up', 'counting', 'profiling'):
        _report(rank, f'{stage} of {len(variants)} variants')
        for kind in KINDS:
            for variant in variants:
                into = counts[variant.name][kind]
                if stage == 'warm-up':
                    update(variant, batch(number), number)
                elif stage == 'counting':
                    into.update(count_update(variant, batch(number), number))
                else:
                    into.update(
                        profile_update(
                            variant, batch(number), number, rank == 0
                        )
                    )
            number += 1

    times: Dict[str, Dict[str, List[Tuple[float, float]]]] = {
        v.name: {kind: [] for kind in KINDS} for v in variants
    }
    for repetition in range(settings['repetitions']):
        started = time.perf_counter()
        for kind in KINDS:
            for variant in _turn(variants, number):
                times[variant.name][kind].append(
                    update(variant, batch(number), number)
                )
            number += 1
        _report(
            rank,
            f'repetition {repetition + 1} of {settings["repetitions"]}: '
            f'{time.perf_counter() - started:.1f} s',
        )
    return dict(
        counts=counts,
        times=times,
        parameters=sum(p.numel() for p in variants[0].model.parameters()),
        trainable=variants[0].trainable,
        modules=find_modules(
            getattr(variants[0].model, 'module', variants[0].model)
        ),
    )


def _turn(variants: List[Variant], number: int) -> List[Variant]:
    """Another order each time, the same on all ranks."""
    generator = torch.Generator().manual_seed(number)
    order = torch.randperm(len(variants), generator=generator)
    return [variants[i] for i in order]


def _report(rank: int, message: str) -> None:
    if rank == 0:
        print(f'{dist.get_world_size()} ranks: {message}', flush=True)
