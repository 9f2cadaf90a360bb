"""Measures what AGVM adds to an update, against plain MMEngine and others.

mmdet's Faster R-CNN R50-FPN trains on small random images, with several
data-parallel ranks on this machine. In every repetition each variant makes one
update that AGVM measures and one that it does not, in random order. Ratios are
taken within a repetition.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import numpy as np
import torch

from benchmarks.launch import launch
from benchmarks.provenance import machine, versions
from benchmarks.rank_cost import (
    CONTROL,
    ESTIMATORS,
    KINDS,
    PLAIN,
    PUBLISHED,
    VARIANTS,
    measure,
)
from mmagvm.analysis.markdown import fill, quartiles, size, table
from mmagvm.analysis.statistics import ratio_summary, summary
from mmagvm.strict_json import to_json

#: A ratio counts as 1 if its whole 95 % interval is this close to 1.
EQUAL = 0.02
#: Intervals between measurements that costs are averaged over.
TAUS = (10, 5)
FLOAT = 4
HOW_COUNTED = dict(
    seconds='wall time of a whole update (data preprocessor, forward, '
    'backward, reduction, step) of the slowest rank, without the barrier '
    'before it; after_forward is its part from backward on',
    ratio='within each repetition, against the plain update of that '
    'repetition and kind; then the median of those',
    bytes='inputs of collectives on rank 0: counted by wrapping the '
    'functions of torch.distributed (wrapped_bytes), plus 4 for every other '
    'element that the profiler sees gloo or NCCL take (profiled_elements); '
    'those are from the C++ reducer of DistributedDataParallel, where no '
    'Python hook replaces it',
    peak_bytes="peak of torch's allocated memory during an update, above that "
    "before it, on rank 0: on a CPU from the profiler's record of every "
    'allocation, on CUDA from max_memory_allocated; without buffers inside '
    'gloo',
    transfers='on CUDA, DtoH copies that the profiler sees in the whole '
    'update; on a CPU, where nothing is transferred, reads from backward on '
    'that would be transfers on CUDA, see HostReads',
)


def summarise(ranks: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Statistics of every variant from the results of the ranks."""
    first = ranks[0]
    # (repetitions, 2) for each variant and kind: the slowest rank decides
    times = {
        name: {
            kind: np.max([rank['times'][name][kind] for rank in ranks], axis=0)
            for kind in KINDS
        }
        for name in first['times']
    }
    variants = {
        name: {
            kind: _summarise_kind(
                times, name, kind, first['counts'][name][kind]
            )
            for kind in KINDS
        }
        for name in times
    }
    for name, stats in variants.items():
        stats['amortised_ratio'] = {
            str(tau): _amortised(times, name, tau) for tau in TAUS
        }
    return dict(
        parameters=first['parameters'],
        trainable=first['trainable'],
        modules=first['modules'],
        variants=variants,
        # seconds of an update and of its part after forward, for each kind
        times={
            name: {kind: values.tolist() for kind, values in kinds.items()}
            for name, kinds in times.items()
        },
    )


def _summarise_kind(
    times: Dict[str, Dict[str, np.ndarray]],
    name: str,
    kind: str,
    counts: Dict[str, Any],
) -> Dict[str, Any]:
    total, after = times[name][kind].T
    plain_total, plain_after = times[PLAIN][kind].T
    stats = dict(
        seconds=summary(total),
        after_forward_seconds=summary(after),
        ratio=ratio_summary(total, plain_total),
        after_forward_ratio=ratio_summary(after, plain_after),
        bytes=counts['wrapped_bytes']
        + FLOAT * (counts['profiled_elements'] - counts['wrapped_elements']),
        **counts,
    )
    stats['transfers'] = (
        counts['device_to_host']
        if torch.cuda.is_available()
        else len(counts['reads'])
    )
    if PUBLISHED in times:
        published = times[PUBLISHED][kind][:, 0]
        stats['published_ratio'] = ratio_summary(published, total)
    return stats


def _amortised(
    times: Dict[str, Dict[str, np.ndarray]], name: str, tau: int
) -> Dict[str, float]:
    """Mean ratio to plain if one of ``tau`` updates is measured."""
    measured, unmeasured = (
        times[name][kind][:, 0] / times[PLAIN][kind][:, 0] for kind in KINDS
    )
    return summary(((tau - 1) * unmeasured + measured) / tau)


def compare_with(stats: Dict[str, float], limit: float, most: bool) -> str:
    """Whether a ratio keeps a limit: ``yes``, ``NO`` or ``undecided``.

    It is undecided if the limit lies inside the 95 % interval of the median.

    Args:
        stats: Of the ratio.
        limit: The limit.
        most: Whether it is an upper limit.
    """
    low, high = stats['low95'], stats['high95']
    if not most:
        low, high, limit = -high, -low, -limit
    if high <= limit:
        return 'yes'
    return 'NO' if low > limit else 'undecided'


def compare_with_one(stats: Dict[str, float]) -> str:
    """Whether a ratio is 1, to within EQUAL."""
    inside = abs(stats['low95'] - 1), abs(stats['high95'] - 1)
    if max(inside) <= EQUAL:
        return 'yes'
    excluded = stats['low95'] > 1 + EQUAL or stats['high95'] < 1 - EQUAL
    return 'NO' if excluded else 'undecided'


def _with_interval(stats: Dict[str, float]) -> str:
    return (
        f'{stats["median"]:.3f} '
        f'({stats["low95"]:.3f} to {stats["high95"]:.3f})'
    )


def judge(results: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Every claim with its limit, what was found, and whether it holds."""
    claims: List[Dict[str, Any]] = []

    def claim(
        text: str, limit: str, found: str, holds: Union[bool, str]
    ) -> None:
        if isinstance(holds, bool):
            holds = 'yes' if holds else 'NO'
        claims.append(dict(claim=text, limit=limit, found=found, holds=holds))

    for ranks, part in results['ranks'].items():
        variants = part['variants']
        plain = variants[PLAIN]
        for name in [e for e in ESTIMATORS if e in variants]:
            stats, where = variants[name], f'{name}, {ranks} ranks'
            free, paid = stats['unmeasured'], stats['measured']
            claim(
                f'{where}: an unmeasured update takes the time of a plain one',
                f'1 within {EQUAL}',
                _with_interval(free['ratio']),
                compare_with_one(free['ratio']),
            )
            for what in ('bytes', 'transfers'):
                more = free[what] - plain['unmeasured'][what]
                claim(
                    f'{where}: {what} that an unmeasured update adds',
                    '0',
                    str(more),
                    more == 0,
                )
            added = paid['bytes'] - plain['measured']['bytes']
            # squared norms in float64: two of each module, split's four
            norms = 2 * FLOAT * len(part['modules'])
            allowed = (
                2 * norms
                if name == 'pairs'
                else FLOAT * part['trainable'] + 4 * norms
            )
            claim(
                f'{where}: bytes that a measured update adds',
                f'at most {allowed}',
                str(added),
                added <= allowed,
            )
            reads = paid['transfers'] - plain['measured']['transfers']
            claim(
                f'{where}: transfers that a measured update adds',
                'at most 1',
                str(reads),
                reads <= 1,
            )
            limit = 1.01 if name == 'pairs' else 1.10
            amortised = stats['amortised_ratio']['10']
            claim(
                f'{where}: amortised time at tau = 10',
                f'at most {limit:.2f}',
                _with_interval(amortised),
                compare_with(amortised, limit, most=True),
            )
            if 'published_ratio' in free:
                speedup = free['published_ratio']
                claim(
                    f'{where}: unmeasured update, faster than the published '
                    'pattern',
                    'at least 1.3',
                    _with_interval(speedup),
                    compare_with(speedup, 1.3, most=False),
                )
    for row in results['optimizer_step']:
        claim(
            f'{row["model"]}, {_implementation(row)}: merged groups make the '
            'optimizer step faster',
            'above 1',
            _with_interval(row['speedup']),
            compare_with(row['speedup'], 1, most=False),
        )
    return claims


def _implementation(row: Dict[str, Any]) -> str:
    return 'foreach' if row['foreach'] else "torch's default"


def tables(results: Dict[str, Any]) -> str:
    """All results as Markdown."""
    host = results['machine']
    settings = results['settings']
    lines = [
        f'{", ".join(host["gpus"]) or host["cpu"]}, {host["cores"]} cores; '
        + ', '.join(f'{k} {v}' for k, v in results['versions'].items())
        + f'; {settings["repetitions"]} repetitions, images of '
        f'{settings["image_size"]} x {settings["image_size"]}, '
        f'{settings["proposals"]} boxes, '
        f'{settings["accumulation"]} micro-batch(es) per update. Load '
        'average of the machine just before: '
        f'{results["load_before"]:.1f}. '
        'Medians with quartiles; in the claims, with the 95 % interval of '
        'the median.'
    ]
    for ranks, part in results['ranks'].items():
        lines += ['', f'**{ranks} ranks: time**', '', _time_table(part)]
        lines += ['', f'**{ranks} ranks: bytes, transfers, memory**', '']
        lines += [_count_table(part)]
    if results['optimizer_step']:
        lines += ['', '**Optimizer step**', '']
        lines += [_step_table(results['optimizer_step'])]
    lines += ['', '**Claims**', '']
    lines += [
        table(
            ('claim', 'limit', 'found', 'holds'),
            [
                (c['claim'], c['limit'], c['found'], c['holds'])
                for c in results['claims']
            ],
        )
    ]
    return '\n'.join(lines)


def _time_table(part: Dict[str, Any]) -> str:
    rows = []
    for name, stats in part['variants'].items():
        for kind in reversed(KINDS):
            found = stats[kind]
            amortised = stats['amortised_ratio']
            rows.append(
                (
                    f'{name}, {kind}',
                    quartiles(found['seconds'], 0, 1000),
                    quartiles(found['ratio'], 3),
                    quartiles(found['after_forward_ratio'], 3),
                    *(
                        quartiles(amortised[str(tau)], 3)
                        if kind == 'measured'
                        else ''
                        for tau in TAUS
                    ),
                )
            )
    return table(
        (
            'update',
            'ms',
            'ratio to plain',
            'ratio without forward',
            *(f'amortised, tau = {tau}' for tau in TAUS),
        ),
        rows,
    )


def _count_table(part: Dict[str, Any]) -> str:
    rows = []
    plain = part['variants'][PLAIN]
    for name, stats in part['variants'].items():
        if name == CONTROL:
            continue
        for kind in reversed(KINDS):
            found = stats[kind]
            rows.append(
                (
                    f'{name}, {kind}',
                    size(found['bytes']),
                    f'{found["bytes"] - plain[kind]["bytes"]:+d}',
                    str(found['transfers']),
                    size(found['peak_bytes']),
                    size(found['peak_bytes'] - plain[kind]['peak_bytes']),
                )
            )
    return table(
        (
            'update',
            'sent',
            'bytes over plain',
            'transfers to the host',
            'peak memory',
            'over plain',
        ),
        rows,
    )


def _step_table(rows: List[Dict[str, Any]]) -> str:
    return table(
        (
            'AdamW with the paramwise_cfg of',
            'implementation',
            'groups, plain',
            'groups, AGVM',
            'plain ms',
            'AGVM ms',
            'times faster',
        ),
        [
            (
                row['model'],
                _implementation(row),
                str(row['groups']['plain']),
                str(row['groups']['agvm']),
                quartiles(row['seconds']['plain'], 1, 1000),
                quartiles(row['seconds']['agvm'], 1, 1000),
                quartiles(row['speedup'], 3),
            )
            for row in rows
        ],
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--ranks',
        type=int,
        nargs='*',
        default=[2, 4],
        help='numbers of ranks on the CPU (default: 2 4); with GPUs one rank '
        'for each GPU',
    )
    parser.add_argument('--repetitions', type=int, default=10)
    parser.add_argument('--image-size', type=int, default=64)
    parser.add_argument(
        '--proposals',
        type=int,
        default=64,
        help='boxes for each head (default: 64)',
    )
    parser.add_argument(
        '--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS)
    )
    parser.add_argument(
        '--step-repetitions',
        type=int,
        default=30,
        help='repetitions of the optimizer step; 0 skips it (default: 30)',
    )
    parser.add_argument('--device', choices=['cpu', 'cuda'])
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/benchmarks/step_cost.json')
    )
    parser.add_argument(
        '--markdown',
        type=Path,
        help='file to write the tables into, between its comments "step_cost"',
    )
    parser.add_argument(
        '--from-json', type=Path, help='show these results, measure nothing'
    )
    return parser.parse_args()


def choose_device(wanted: Optional[str]) -> str:
    """CUDA if MMCV's operators run there too."""
    from mmcv.ops import get_compiling_cuda_version

    if wanted is None:
        usable = get_compiling_cuda_version() != 'not available'
        return 'cuda' if torch.cuda.is_available() and usable else 'cpu'
    return wanted


def run(args: argparse.Namespace) -> Dict[str, Any]:
    """Measure everything."""
    device = choose_device(args.device)
    variants = list(args.variants)
    if PLAIN not in variants:
        variants.insert(0, PLAIN)
    world_sizes = args.ranks
    if device == 'cuda':
        world_sizes = [torch.cuda.device_count()]
    else:
        os.environ['CUDA_VISIBLE_DEVICES'] = '-1'
    settings = dict(
        device=device,
        repetitions=args.repetitions,
        image_size=args.image_size,
        proposals=args.proposals,
        variants=variants,
        # on one rank AGVM compares micro-batches
        accumulation=2 if world_sizes == [1] else 1,
    )
    results: Dict[str, Any] = dict(
        machine=machine(),
        versions=versions(),
        settings=settings,
        how_counted=HOW_COUNTED,
        load_before=os.getloadavg()[0],
        ranks={},
        optimizer_step=[],
    )
    started = time.time()
    for world_size in world_sizes:
        possible = [
            name
            for name in variants
            if name != PUBLISHED or world_size % 2 == 0
        ]
        results['ranks'][str(world_size)] = summarise(
            launch(
                measure,
                world_size,
                dict(settings, variants=possible),
                device=device,
                threads=max(1, (os.cpu_count() or 1) // world_size),
            )
        )
        save(results, args.out)  # in case a later measurement is stopped
    if args.step_repetitions:
        from benchmarks.group_cost import measure_groups

        results['optimizer_step'] = measure_groups(
            args.step_repetitions, device
        )
    results['minutes'] = (time.time() - started) / 60
    return results


def save(results: Dict[str, Any], path: Path) -> None:
    """Write the results so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(results, indent=1))


def main() -> None:
    args = parse_args()
    if args.from_json is not None:
        results = json.loads(args.from_json.read_text())
    else:
        results = run(args)
    results['claims'] = judge(results)
    text = tables(results)
    print(text)
    if args.from_json is None:
        save(results, args.out)
        print(f'\n{results["minutes"]:.1f} min; all figures in {args.out}')
    if args.markdown is not None:
        fill(args.markdown, 'step_cost', text)


if __name__ == '__main__':
    main()
