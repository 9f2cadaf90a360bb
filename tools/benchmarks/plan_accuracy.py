"""Compares the times that plan_run predicts with those of ranks on this CPU.

Calibrated are the time of a Faster R-CNN's update on one rank, and bandwidth
and latency of an all-reduce of plain tensors between two ranks.
Updates on more ranks are predicted, plain and measured by AGVM. Ranks are
processes over gloo, with one thread each. If there are more ranks than cores,
computing and sending are assumed to take as many times longer. The shortest
of all times counts, as other programs have disturbed it least. Medians are
shown next to it.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.benchmark_models import build_detector, make_data
from benchmarks.launch import launch
from benchmarks.provenance import machine, versions
from benchmarks.rank_cost import ESTIMATORS, PLAIN, Variant, update
from mmagvm.analysis.markdown import fill, table
from mmagvm.analysis.statistics import summary
from mmagvm.planning.time_model import (  # noqa: E402
    Cluster,
    Gradients,
    all_reduce_seconds,
    update_seconds,
)
from mmagvm.strict_json import to_json

#: Bytes of the all-reduces that bandwidth and latency are taken from.
SIZES = (4_000, 25 * 2**20)
REDUCTIONS = 9


def measure(
    rank: int, device: torch.device, settings: Dict[str, Any]
) -> Dict[str, Any]:
    """The work of one rank."""
    return dict(
        reductions=time_reductions(), updates=time_updates(rank, settings)
    )


def time_reductions() -> Dict[int, List[float]]:
    """Seconds of all-reduces by their size, the first ones left out."""
    found: Dict[int, List[float]] = {}
    for size in SIZES:
        tensor = torch.ones(size // 4)
        found[size] = []
        for _ in range(REDUCTIONS + 1):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(tensor)
            found[size].append(time.perf_counter() - start)
        found[size] = found[size][1:]
    return found


def time_updates(
    rank: int, settings: Dict[str, Any]
) -> Dict[str, List[float]]:
    """Seconds of updates by variant and kind, the variants taking turns."""
    world_size = dist.get_world_size()
    # AGVM has nothing to compare on one rank without accumulation
    names = [PLAIN, *ESTIMATORS] if world_size > 1 else [PLAIN]
    variants = [
        Variant(
            name,
            lambda: build_detector(settings['proposals']),
            1,
            torch.device('cpu'),
        )
        for name in names
    ]
    found: Dict[str, List[float]] = {}
    for repetition in range(settings['repetitions'] + 1):
        # every second update is measured, the first one is
        for kind in (' measured', ''):
            for variant in variants:
                number = 2 * repetition + bool(kind)
                data = make_data(settings['image_size'], 10 * number + rank)
                seconds, _ = update(variant, [data], number)
                plain = variant.name == PLAIN
                if repetition and not (plain and kind):
                    name = variant.name + ('' if plain else kind)
                    found.setdefault(name, []).append(seconds)
        if rank == 0:
            print(
                f'{world_size} ranks: repetition {repetition} of '
                f'{settings["repetitions"]}',
                flush=True,
            )
    found['trainable'] = [float(variants[0].trainable)]
    return found


def slowest(world_size: int, settings: Dict[str, Any]) -> Dict[str, Any]:
    """Run the ranks; each time is that of the slowest one."""
    ranks = launch(measure, world_size, settings)
    return {
        part: {
            name: np.max([rank[part][name] for rank in ranks], 0).tolist()
            for name in ranks[0][part]
        }
        for part in ('reductions', 'updates')
    }


def fit_cluster(
    compute: Sequence[float], reductions: Dict[int, List[float]]
) -> Cluster:
    """A cluster from one rank's updates and two ranks' all-reduces.

    The time of a small all-reduce is latency, which a large one has too.
    """
    small, large = (min(reductions[size]) for size in SIZES)
    # between two ranks a ring has 2 steps and sends V
    return Cluster(
        min(compute),
        (SIZES[1] - SIZES[0]) / max(large - small, 1e-9),
        small / 2,
    )


def predict(
    world_size: int, gradients: Gradients, cluster: Cluster, cores: int
) -> Dict[str, float]:
    """Seconds of every kind of update, on ranks that share the cores."""
    slower = max(1.0, world_size / cores)
    shared = Cluster(
        cluster.compute * slower,
        cluster.bandwidth / slower,
        cluster.latency * slower,
    )

    def seconds(estimator: str, measured: float) -> float:
        return update_seconds(
            world_size, 1, gradients, shared, estimator, measured
        ).total

    found = {PLAIN: seconds('pairs', 0)}
    for estimator in ESTIMATORS:
        found[estimator] = seconds(estimator, 0)
        found[f'{estimator} measured'] = seconds(estimator, 1)
    found['all-reduce of 25 MiB'] = all_reduce_seconds(
        world_size, SIZES[1], 1, shared
    )
    return found


def compare(results: Dict[str, Any]) -> List[List[str]]:
    """Rows of predicted and measured times."""
    rows = []
    for world_size, part in results['ranks'].items():
        for name, predicted in part['predicted'].items():
            found = summary(part['measured'][name])
            shortest = min(part['measured'][name])
            rows.append(
                [
                    f'{world_size} ranks: {name}',
                    f'{predicted * 1e3:.0f}',
                    f'{shortest * 1e3:.0f}',
                    f'{predicted / shortest:.2f}',
                    f'{found["median"] * 1e3:.0f} '
                    f'({found["low95"] * 1e3:.0f} to '
                    f'{found["high95"] * 1e3:.0f})',
                ]
            )
    return rows


def report(results: Dict[str, Any]) -> str:
    """All results as Markdown."""
    host, cluster = results['machine'], results['cluster']
    return (
        f'{host["cpu"]}, {results["cores"]} cores; '
        + ', '.join(f'{k} {v}' for k, v in results['versions'].items())
        + f'; {results["settings"]["repetitions"]} repetitions. Load average '
        'of the machine just before: '
        f'{results["load_before"]:.1f}. Calibrated: '
        f'{cluster["compute"] * 1e3:.0f} ms per update on one rank, '
        f'{cluster["bandwidth"] * 8e-9:.2f} Gbit/s, '
        f'{cluster["latency"] * 1e6:.0f} us. Medians with their 95 % '
        'interval.\n\n'
        + table(
            (
                'update',
                'predicted ms',
                'measured ms, shortest',
                'predicted / measured',
                'measured ms, median',
            ),
            compare(results),
        )
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--ranks', type=int, nargs='+', default=[2, 4])
    parser.add_argument('--repetitions', type=int, default=8)
    parser.add_argument('--image-size', type=int, default=64)
    parser.add_argument('--proposals', type=int, default=64)
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/benchmarks/plan_accuracy.json'),
    )
    parser.add_argument(
        '--markdown',
        type=Path,
        help='file to write the table into, between its comments '
        '"plan_accuracy"',
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if min(args.ranks) < 2:
        raise SystemExit(f'--ranks {min(args.ranks)}: write 2 or more')
    if args.repetitions < 1:
        raise SystemExit(f'--repetitions {args.repetitions}: write 1 or more')
    settings = dict(
        repetitions=args.repetitions,
        image_size=args.image_size,
        proposals=args.proposals,
    )
    load_before = os.getloadavg()[0]
    cores = len(os.sched_getaffinity(0))
    found = {n: slowest(n, settings) for n in sorted({1, 2, *args.ranks})}
    cluster = fit_cluster(found[1]['updates'][PLAIN], found[2]['reductions'])
    # as AGVM has in Faster R-CNN
    gradients = Gradients(4 * found[1]['updates']['trainable'][0], 4)
    ranks = {}
    for world_size in args.ranks:
        part = found[world_size]
        measured = {k: v for k, v in part['updates'].items()}
        measured['all-reduce of 25 MiB'] = part['reductions'][SIZES[1]]
        ranks[world_size] = dict(
            predicted=predict(world_size, gradients, cluster, cores),
            measured=measured,
        )
    results = dict(
        machine=machine(),
        versions=versions(),
        cores=cores,
        load_before=load_before,
        settings=settings,
        cluster=vars(cluster),
        ranks=ranks,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(to_json(results, indent=1))
    print(report(results))
    if args.markdown:
        fill(args.markdown, 'plan_accuracy', report(results))


if __name__ == '__main__':
    main()
