"""Tables and figures of a study's results, written into docs/evidence.md."""

import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from mmengine.config import Config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path += [
    str(ROOT / 'tools' / folder) for folder in ('analysis_tools', 'benchmarks')
]

from figures import COLOURS, DASHES, PAGE, TEXT, plt  # noqa: E402
from markdown_report import fill, table  # noqa: E402
from plan import (  # noqa: E402
    Cell,
    Done,
    Result,
    Run,
    best_rate,
    by_run,
    plan,
    tuning_rates,
)
from run_study import read_results  # noqa: E402

#: The part of a training that phi is averaged over: after warm-up, and before
#: the learning rate falls, when all of them go to 1.
MIDDLE = (0.25, 0.75)
NOT_RUN = 'not run'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--study', type=Path, default=HERE / 'study.py')
    parser.add_argument('--results', type=Path, default=HERE / 'results.jsonl')
    parser.add_argument('--out', type=Path, default=ROOT / 'docs/evidence.md')
    parser.add_argument(
        '--figure', type=Path, default=ROOT / 'resources/evidence.png'
    )
    return parser.parse_args()


def finals(study: Mapping[str, Any], done: Done, cell: Cell) -> List[Result]:
    """Results of a cell's seeds with its tuned rate."""
    rate = best_rate(study, cell, done)
    return [
        result
        for run, result in done.items()
        if run.cell == cell and run.lr == rate and rate is not None
    ]


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean, and standard deviation over seeds where there are several."""
    if not values:
        return NOT_RUN
    if len(values) == 1:
        return f'{values[0]:.3f} (1 seed)'
    return f'{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}'


def tested(results: Sequence[Result]) -> str:
    """The metric on test images, and how many runs diverged."""
    text = mean_and_spread([r['metrics']['test'] for r in results])
    diverged = sum(r['status'] == 'diverged' for r in results)
    return f'{text}, {diverged} diverged' if diverged else text


def cells_of(study: Mapping[str, Any], done: Done) -> List[Cell]:
    """All cells, in the order of the stages."""
    return list(dict.fromkeys(run.cell for run in plan(study, done)))


def results_table(study: Mapping[str, Any], done: Done, model: str) -> str:
    """Test metric by method and batch size, and what the largest loses."""
    found = [
        cell
        for cell in cells_of(study, done)
        if cell.model == model and not cell.variant
    ]
    sizes = sorted({cell.batch_size for cell in found})
    methods = [
        name
        for name in study['methods']
        if any(cell.method == name for cell in found)
    ]
    rows = []
    for method in methods:
        row, metrics = [method], []
        for size in sizes:
            cell = Cell(model, method, size)
            rate = best_rate(study, cell, done)
            results = finals(study, done, cell)
            text = tested(results)
            row.append(text if rate is None else f'{text} (lr {rate:g})')
            metrics.append([r['metrics']['test'] for r in results])
        lost = (
            f'{np.mean(metrics[-1]) - np.mean(metrics[0]):+.3f}'
            if metrics[0] and metrics[-1]
            else NOT_RUN
        )
        rows.append([*row, lost])
    header = [f'batch {size}' for size in sizes]
    return table(['method', *header, f'{sizes[0]} to {sizes[-1]}'], rows)


def tuning_table(study: Mapping[str, Any], done: Done, model: str) -> str:
    """Metric on tuning images by learning rate, one seed each."""
    rows = []
    for cell in cells_of(study, done):
        if cell.model != model or cell.variant:
            continue
        shown = []
        for rate in tuning_rates(study, cell, done):
            result = done.get(Run(cell, rate, study['tune_seed']))
            if result is None:
                value = NOT_RUN
            elif result['status'] == 'diverged':
                value = 'diverged'
            else:
                value = f'{result["metrics"]["tune"]:.3f}'
            shown.append(f'{rate:g}: {value}')
        rows.append([cell.method, str(cell.batch_size), ', '.join(shown)])
    return table(['method', 'batch', 'learning rate: metric'], rows)


def middle_mean(bins: Sequence[Optional[float]]) -> float:
    """Mean of a series over the middle of a training; NaN without any."""
    first, last = (round(part * len(bins)) for part in MIDDLE)
    values = [value for value in bins[first:last] if value is not None]
    return float(np.mean(values)) if values else float('nan')


def variance_table(study: Mapping[str, Any], done: Done, model: str) -> str:
    """phi of each module, mid-training, and how far apart they are."""
    rows: List[List[str]] = []
    modules: List[str] = []
    for cell in cells_of(study, done):
        results = finals(study, done, cell)
        if cell.model != model or not results:
            continue
        phis = {
            module: float(
                np.nanmean(
                    [middle_mean(r['variance'][module]) for r in results]
                )
            )
            for module in results[0]['variance']
        }
        modules += [name for name in phis if name not in modules]
        spread = max(phis.values()) / min(phis.values())
        rows.append(
            [
                cell.method,
                str(cell.batch_size),
                cell.variant or '-',
                *(f'{phis[m]:.2f}' if m in phis else '-' for m in modules),
                f'{spread:.1f}',
            ]
        )
    header = ['method', 'batch', 'variant', *modules, 'largest / smallest']
    return table(header, rows)


def variants_table(study: Mapping[str, Any], done: Done) -> str:
    """Test metric of each variant beside the run without."""
    rows = []
    for cell in cells_of(study, done):
        if not cell.variant:
            continue
        base = Cell(cell.model, cell.method, cell.batch_size)
        rows.append(
            [
                cell.variant,
                cell.method,
                str(cell.batch_size),
                tested(finals(study, done, cell)),
                tested(finals(study, done, base)),
            ]
        )
    return table(['variant', 'method', 'batch', 'with it', 'without'], rows)


def cost_table(done: Done) -> str:
    """AGVM's share of a training's time, from updates of the same run."""
    rows = []
    by_size: Dict[Tuple[str, int, int], List[Dict[str, float]]] = {}
    for run, result in done.items():
        time = result.get('update_time')
        if time and not run.cell.variant and result['status'] == 'ended':
            key = run.cell.model, run.cell.batch_size, time['interval']
            by_size.setdefault(key, []).append(time)
    for (model, size, interval), times in sorted(by_size.items()):
        shares = [100 * time['share'] for time in times]
        rows.append(
            [
                model,
                str(size),
                str(interval),
                str(len(shares)),
                f'{np.median(shares):.2f} % '
                f'({min(shares):.2f} to {max(shares):.2f})',
            ]
        )
    return table(
        ['model', 'batch', 'tau', 'runs', 'median share (range)'], rows
    )


def draw(study: Mapping[str, Any], done: Done, file: Path) -> None:
    """phi of each module over the training: small batch, large, with AGVM."""
    largest = max(
        cell.batch_size for cell in cells_of(study, done) if not cell.variant
    )
    smallest = min(cell.batch_size for cell in cells_of(study, done))
    panels = [
        (f'SGD, batch {smallest}', Cell('faster_rcnn', 'sgd', smallest)),
        (f'SGD, batch {largest}', Cell('faster_rcnn', 'sgd', largest)),
        (
            f'SGD with AGVM, batch {largest}',
            Cell('faster_rcnn', 'agvm_sgd', largest),
        ),
    ]
    epochs = study['training']['epochs']
    with plt.rc_context(TEXT):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(PAGE, 2.4), sharex=True, sharey=True
        )
        for axis, (title, cell) in zip(axes, panels):
            results = finals(study, done, cell)
            metric = tested(finals(study, done, cell))
            axis.set_title(f'{title}\nbox AP {metric}')
            axis.set_xlabel('epoch')
            for index, module in enumerate(
                results[0]['variance'] if results else ()
            ):
                # over seeds; None is where nothing was measured
                series = np.array(
                    [r['variance'][module] for r in results], dtype=float
                )
                known = np.isfinite(series).any(axis=0)
                means = np.nanmean(series[:, known], axis=0)
                x = (np.arange(series.shape[1]) + 0.5) / series.shape[1]
                axis.plot(
                    epochs * x[known],
                    means,
                    color=COLOURS[index],
                    linestyle=DASHES[index % len(DASHES)],
                    label=module,
                    linewidth=1.2,
                )
        axes[0].set_ylabel(r'gradient variance $\phi$')
        axes[0].set_ylim(bottom=0)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc='lower center', ncol=4, frameon=False
        )
        figure.tight_layout(rect=(0, 0.08, 1, 1))
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=300)
        plt.close(figure)


def main() -> None:
    args = parse_args()
    study = Config.fromfile(args.study)
    results = read_results(args.results)
    if not results:
        raise SystemExit(
            f'{args.results}: no results: start tools/study/run_study.py'
        )
    done = by_run(study, results)
    for model in dict.fromkeys(run.cell.model for run in done):
        fill(args.out, f'results {model}', results_table(study, done, model))
        fill(args.out, f'tuning {model}', tuning_table(study, done, model))
        fill(args.out, f'variance {model}', variance_table(study, done, model))
    fill(args.out, 'variants', variants_table(study, done))
    fill(args.out, 'cost', cost_table(done))
    draw(study, done, args.figure)
    runs = list(plan(study, done))
    print(
        f'{args.out} and {args.figure}, of {len(done)} runs; the study has '
        f'{len(runs)}'
    )


if __name__ == '__main__':
    main()
