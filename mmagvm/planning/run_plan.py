"""Plans a training with AGVM: length, learning rate, warm-up and time."""

import math
from dataclasses import dataclass, fields
from typing import Callable, Optional, Sequence, Tuple

import numpy as np
from mmengine.config import Config
from torch import nn

from mmagvm.analysis.markdown import table
from mmagvm.core import Settings
from mmagvm.core.modules import (
    BACKBONE,
    find_anchor,
    module_groups,
    refuse_single_module,
)
from mmagvm.engine.config_types import type_name
from mmagvm.errors import refuse
from mmagvm.planning import large_batch as large_batch_plan
from mmagvm.planning.batch import Batch
from mmagvm.planning.config_reader import (
    innermost,
)
from mmagvm.planning.plan import Plan
from mmagvm.planning.time_model import (
    Cluster,
    Gradients,
    Update,
    update_seconds,
)

#: GPUs of the table.
GPUS = (8, 16, 32, 64, 128, 256, 512, 768, 1024, 1536)

# -- what is trained


@dataclass(frozen=True)
class Training:
    """What make_large_batch_config would write for a batch.

    Args:
        batch: Its size, and how it is made.
        updates: Of the optimizer, over the whole training.
        lr: Learning rate.
        warmup: Its length, in updates.
        interval: Updates between two measurements.
        begin: The first measured update.
        end: Measuring stops before this update; None for never.
    """

    batch: Batch
    updates: int
    lr: float
    warmup: int
    interval: int
    begin: int
    end: Optional[int] = None

    @property
    def measured(self) -> float:
        """Part of the updates that AGVM measures."""
        end = min(self.updates, self.end or self.updates)
        return len(range(self.begin, end, self.interval)) / max(
            1, self.updates
        )


def plan_training(
    cfg: Config, batch: Batch, images: int, dataset: str
) -> Training:
    """Length, learning rate, warm-up and AGVM's settings for a batch.

    Args:
        cfg: The original.
        batch: The batch.
        images: Of an epoch; unused where iterations are counted.
        dataset: 'CocoDataset' or 'ADE20KDataset', for the learning-rate rule.
    """
    result = Plan()
    warmup, total = large_batch_plan.plan_training(
        result, cfg, batch, None, dataset, images
    )
    wrapper = result.diff['optim_wrapper']
    return Training(
        batch,
        math.ceil(total),
        wrapper['optimizer']['lr'],
        warmup,
        wrapper['interval'],
        wrapper['begin'],
        cfg.optim_wrapper.get('end'),
    )


def find_dataset(cfg: Config, rule: Optional[str]) -> str:
    """The data set with the learning-rate rule to follow."""
    known = dict(COCO='CocoDataset', ADE20K='ADE20KDataset')
    if rule is not None:
        return known[rule]
    name = type_name(innermost(cfg.train_dataloader.dataset).get('type'))
    for part, dataset in known.items():
        if part.lower() in name.lower():
            return dataset
    refuse(
        f'train_dataloader.dataset.type={name!r}: the paper has no '
        'learning-rate rule for it: choose one with --rule '
        f'{" or ".join(known)}'
    )


def check_settings(cfg: Config) -> None:
    """Refuse settings that AGVM refuses, and what this plan does not know."""
    wrapper = cfg.optim_wrapper
    names = [field.name for field in fields(Settings)]
    try:
        Settings(**{name: wrapper[name] for name in names if name in wrapper})
    except ValueError as error:
        refuse(str(error))
    strategy = type_name((cfg.get('strategy') or {}).get('type'))
    if strategy:
        refuse(
            f'strategy.type={strategy!r}: the plan is for data-parallel '
            'training, in which GPUs exchange gradients only: remove strategy '
            'and runner_type to plan that'
        )


def count_gradients(model: nn.Module, cfg: Config) -> Gradients:
    """What a model sends, from its trainable parameters.

    Raises:
        UsageError: AGVM cannot train the model.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    wrapper = cfg.optim_wrapper
    halved = wrapper.get('comm_hook') in ('fp16', 'bf16')
    try:
        groups = module_groups(model, wrapper.get('modules'))
        modules = dict.fromkeys(g['module'] for g in groups if g['module'])
        find_anchor([*modules], wrapper.get('anchor') or BACKBONE)
        refuse_single_module([*modules])
    except ValueError as error:
        refuse(str(error))
    return Gradients(4 * trained, len(modules), 0.5 if halved else 1.0)


# -- from times to compute and latency


def calibrate(
    times: Sequence[Tuple[Training, float]],
    gradients: Gradients,
    cluster: Cluster,
    estimator: str,
) -> Cluster:
    """Compute and latency that reproduce the times of two trainings.

    Time is linear in both, so two times give exactly one answer.

    Args:
        times: Two trainings, and the seconds of each.
        gradients: What they send.
        cluster: Its bandwidth and overlap are taken as they are.
        estimator: AGVM's.

    Raises:
        UsageError: Only negative values reproduce them.
    """

    def seconds(training: Training, compute: float, latency: float) -> float:
        return update_seconds(
            training.batch.gpus,
            training.batch.accumulation,
            gradients,
            Cluster(compute, cluster.bandwidth, latency, cluster.overlap),
            estimator,
            training.measured,
        ).total

    rows, rest = [], []
    for training, whole in times:
        fixed = seconds(training, 0, 0)
        rows.append(
            [
                seconds(training, 1, 0) - fixed,
                seconds(training, 0, 1) - fixed,
            ]
        )
        rest.append(whole / training.updates - fixed)
    if abs(np.linalg.det(rows)) < 1e-9:
        refuse(
            '--calibrate: both times are for the same number of GPUs: give '
            'two different numbers'
        )
    compute, latency = np.linalg.solve(rows, rest)
    if compute <= 0 or latency < 0:
        refuse(
            '--calibrate: the times would need '
            f'{compute * 1e3:.0f} ms of computing and '
            f'{latency * 1e6:.1f} us of latency: check the times, or '
            '--bandwidth-gbps'
        )
    return Cluster(compute, cluster.bandwidth, latency, cluster.overlap)


# -- reporting


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (('d', 86400), ('h', 3600), ('min', 60)):
        if seconds >= 2 * size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.1f} s'


def parts_table(training: Training, update: Update) -> str:
    """Where the time of one training goes."""
    rows = [
        ('compute', update.compute),
        ('all-reduce', update.all_reduce),
        ('AGVM', update.agvm),
        ('whole', update.total),
    ]
    return table(
        ('part', 'ms per update', 'of training', 'share'),
        [
            (
                name,
                f'{seconds * 1e3:.2f}',
                duration(seconds * training.updates),
                f'{100 * seconds / update.total:.2f} %',
            )
            for name, seconds in rows
        ],
    )


def gpus_table(rows: Sequence[Tuple[Training, Update]]) -> str:
    """The same on other numbers of GPUs, each with as many images."""
    return table(
        (
            'GPUs',
            'batch',
            'updates',
            'learning rate',
            'warm-up',
            'ms per update',
            'all-reduce',
            'AGVM',
            'efficiency',
            'time',
        ),
        [
            (
                f'{training.batch.gpus}',
                f'{training.batch.size}',
                f'{training.updates}',
                f'{training.lr:g}',
                f'{training.warmup}',
                f'{update.total * 1e3:.1f}',
                f'{100 * update.all_reduce / update.total:.1f} %',
                f'{100 * update.agvm / update.total:.2f} %',
                f'{100 * update.compute / update.total:.0f} %',
                duration(update.total * training.updates),
            )
            for training, update in rows
        ],
    )


def report(
    config: str,
    wanted: Training,
    others: Sequence[Training],
    update_on: Callable[[Training], Update],
    gradients: Gradients,
    cluster: Cluster,
    estimator: str,
    source: str,
) -> str:
    """The whole plan of a run, in Markdown.

    Args:
        config: Its name.
        wanted: The training that was asked for.
        others: The same on other numbers of GPUs.
        update_on: The parts of an update's time.
        gradients: What is sent.
        cluster: The cluster.
        estimator: AGVM's.
        source: Of the time of computing.
    """
    batch = wanted.batch
    update = update_on(wanted)
    return (
        f'{config}\n'
        f'- batch {batch.size} = {batch.gpus} GPUs x {batch.images_per_gpu} '
        f'images x {batch.accumulation} micro-batches; the original: '
        f'{batch.base}\n'
        f'- {wanted.updates} updates, learning rate {wanted.lr:g}, warm-up '
        f'over {wanted.warmup} updates\n'
        f'- AGVM with {estimator} measures every {wanted.interval} updates '
        f'from {wanted.begin}: {100 * wanted.measured:.1f} % of all\n'
        f'- gradients: {gradients.sent * gradients.size / 1e6:.1f} MB in '
        f'{gradients.buckets} buckets, of {gradients.modules} modules\n'
        f'- {cluster.compute * 1e3:.1f} ms per iteration without '
        f'communication, {source}\n'
        f'- {cluster.bandwidth * 8 / 1e9:g} Gbit/s, '
        f'{cluster.latency * 1e6:.2f} us per step of the ring, '
        f'{100 * cluster.overlap:.0f} % hidden\n\n'
        f'{parts_table(wanted, update)}\n\n'
        f'With {batch.images_per_gpu * batch.accumulation} images on each '
        'GPU:\n\n'
        f'{gpus_table([(each, update_on(each)) for each in others])}\n\n'
        'Not included: data loading, validation, checkpoints, start, '
        'stragglers, the exchange of synchronized batch norm. A ring is the '
        'slowest all-reduce for many GPUs.'
    )
