"""Tables and figures of a study's results, written into docs/evidence.md."""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

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
    cells,
    plan,
    tuning_rates,
)
from run_study import read_results  # noqa: E402

NOT_RUN = 'not run'
#: What figures show.
SHOWN = 'faster_rcnn'
COMPARED = dict(sgd='SGD', agvm_sgd='AGVM')


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


def on_test_images(results: Sequence[Result]) -> str:
    """The metric on test images, and how many runs diverged."""
    ended = [r for r in results if r['status'] == 'ended']
    diverged = len(results) - len(ended)
    if not diverged:
        return mean_and_spread([r['metrics']['test'] for r in ended])
    if not ended:
        return f'{diverged} of {diverged} diverged'
    text = mean_and_spread([r['metrics']['test'] for r in ended])
    return f'{text}, {diverged} of {len(results)} diverged'


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
            text = on_test_images(results) if cell in found else '-'
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
        rates = tuning_rates(study, cell, done)
        best = best_rate(study, cell, done)
        for rate in rates:
            result = done.get(Run(cell, rate, study['tune_seed']))
            if result is None:
                value = NOT_RUN
            elif result['status'] == 'diverged':
                value = 'diverged'
            else:
                value = f'{result["metrics"]["tune"]:.3f}'
            shown.append(f'{rate:g}: {value}')
        if best in (rates[0], rates[-1]):
            shown.append('the best is at the end of the grid')
        rows.append([cell.method, str(cell.batch_size), ', '.join(shown)])
    return table(['method', 'batch', 'learning rate: metric'], rows)


def survival_table(study: Mapping[str, Any], done: Done) -> str:
    """How runs with given rates ended, one row for each cell and rate."""
    rows = []
    for stage in study['stages']:
        for rate in stage.get('rates', ()):
            for cell in cells(stage):
                results = [
                    result
                    for run, result in done.items()
                    if run.cell == cell and run.lr == rate
                ]
                rows.append(
                    [
                        cell.method,
                        str(cell.batch_size),
                        cell.variant or '-',
                        f'{rate:g}',
                        on_test_images(results),
                    ]
                )
    return table(['method', 'batch', 'variant', 'lr', 'test'], rows)


def middle(study: Mapping[str, Any], bins: int) -> slice:
    """The bins that phi is averaged over.

    They are from one epoch after warm-up, when a moving average has begun to
    follow, to where the learning rate falls, after which every phi goes to 1.
    """
    training = study['training']
    first = (training['warmup_epochs'] + 1) / training['epochs']
    last = training['decay_epochs'][0] / training['epochs']
    return slice(math.ceil(first * bins), int(last * bins))


def middle_means(
    study: Mapping[str, Any], results: Sequence[Result], modulated: bool
) -> Dict[str, float]:
    """phi of each module, over the middle of trainings and over seeds.

    Args:
        study: The declaration.
        results: Of runs that did not diverge.
        modulated: Instead phi times mu**2, which AGVM aligns: the gradient
            variance at the learning rate that the module has (eq. 2).
    """
    means = {}
    for module in results[0]['variance']:
        values = series(results, module, modulated)
        middle_part = values[:, middle(study, values.shape[1])]
        means[module] = float(np.nanmean(middle_part))
    return means


def series(
    results: Sequence[Result], module: str, modulated: bool
) -> np.ndarray:
    """phi, or mu**2 * phi, by run and part of it; NaN where unmeasured."""
    phi, scale = (
        np.array([r[name][module] for r in results], dtype=float)
        for name in ('variance', 'lr_scale')
    )
    return phi * scale**2 if modulated else phi


def compared_rates(
    study: Mapping[str, Any], done: Done, cell: Cell
) -> List[float]:
    """The rates that a cell's variances are shown at.

    Its tuned one, those of the methods with the same grid, as phi depends on
    the rate, and those that a stage gives.
    """
    grid = study['methods'][cell.method]['rates']
    found = {
        best_rate(study, replace(cell, method=method), done)
        for method, declared in study['methods'].items()
        if declared['rates'] == grid
    }
    for stage in study['stages']:
        if cell in cells(stage):
            found.update(stage.get('rates', ()))
    return sorted(rate for rate in found if rate is not None)


def variance_table(study: Mapping[str, Any], done: Done, model: str) -> str:
    """phi of each module, mid-training, and how far apart they are."""
    rows: List[List[str]] = []
    modules: List[str] = []
    for cell in cells_of(study, done):
        if cell.model != model:
            continue
        for rate in compared_rates(study, done, cell):
            results = [
                result
                for run, result in done.items()
                if run.cell == cell
                and run.lr == rate
                and result['status'] == 'ended'
            ]
            if not results:
                continue
            phis = middle_means(study, results, modulated=False)
            modules += [name for name in phis if name not in modules]
            modulated = study['methods'][cell.method]['modulate']
            aligned = middle_means(study, results, modulated=modulated)
            rows.append(
                [
                    cell.method,
                    str(cell.batch_size),
                    cell.variant or '-',
                    f'{rate:g}',
                    str(len(results)),
                    *(f'{phis[m]:.2f}' if m in phis else '-' for m in modules),
                    f'{spread(phis):.1f}',
                    f'{spread(aligned):.1f}',
                ]
            )
    header = ['method', 'batch', 'variant', 'lr', 'seeds', *modules]
    return table([*header, 'spread of φ', 'spread of μ²φ'], rows)


def spread(values: Mapping[str, float]) -> float:
    """The largest of some variances over the smallest."""
    return max(values.values()) / min(values.values())


def variants_table(study: Mapping[str, Any], done: Done) -> str:
    """Test metric of each variant beside the run without, same seeds."""
    rows = []
    for cell in cells_of(study, done):
        if not cell.variant:
            continue
        with_it = finals(study, done, cell)
        seeds = {result['seed'] for result in with_it}
        without = [
            result
            for result in finals(study, done, replace(cell, variant=''))
            if result['seed'] in seeds
        ]
        rows.append(
            [
                cell.variant,
                cell.method,
                str(cell.batch_size),
                on_test_images(with_it),
                on_test_images(without),
            ]
        )
    return table(['variant', 'method', 'batch', 'with it', 'without'], rows)


def cost_table(done: Done) -> str:
    """AGVM's share of updates' time, from updates of the same run."""
    rows = []
    by_kind: Dict[Tuple[str, str, int, int], List[Dict[str, float]]] = {}
    for run, result in done.items():
        cell, time = run.cell, result.get('update_time')
        if time and result['status'] == 'ended':
            key = cell.model, cell.method, cell.batch_size, time['interval']
            by_kind.setdefault(key, []).append(time)
    for (model, method, size, interval), times in sorted(by_kind.items()):
        shares = [100 * time['share'] for time in times]
        rows.append(
            [
                model,
                method,
                str(size),
                str(interval),
                str(len(shares)),
                f'{np.median(shares):.2f} % '
                f'({min(shares):.2f} to {max(shares):.2f})',
            ]
        )
    return table(
        ['model', 'method', 'batch', 'tau', 'runs', 'median share (range)'],
        rows,
    )


def draw(study: Mapping[str, Any], done: Done, file: Path) -> None:
    """Variance of each module over the training: small batch, large, AGVM."""
    largest = max(
        cell.batch_size for cell in cells_of(study, done) if not cell.variant
    )
    smallest = min(cell.batch_size for cell in cells_of(study, done))
    panels = [
        (f'SGD, batch {smallest}', Cell(SHOWN, 'sgd', smallest)),
        (f'SGD, batch {largest}', Cell(SHOWN, 'sgd', largest)),
        (f'AGVM, batch {largest}', Cell(SHOWN, 'agvm_sgd', largest)),
    ]
    epochs = study['training']['epochs']
    with plt.rc_context(TEXT):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(PAGE, 2.4), sharex=True, sharey=True
        )
        for axis, (title, cell) in zip(axes, panels):
            results = finals(study, done, cell)
            metric = on_test_images(results)
            results = [r for r in results if r['status'] == 'ended']
            modulated = study['methods'][cell.method]['modulate']
            axis.set_title(f'{title}\nbox AP {metric}')
            axis.set_xlabel('epoch')
            for index, module in enumerate(
                results[0]['variance'] if results else ()
            ):
                values = series(results, module, modulated)
                known = np.isfinite(values).any(axis=0)
                means = np.nanmean(values[:, known], axis=0)
                x = (np.arange(values.shape[1]) + 0.5) / values.shape[1]
                axis.plot(
                    epochs * x[known],
                    means,
                    color=COLOURS[index],
                    linestyle=DASHES[index % len(DASHES)],
                    label=module,
                    linewidth=1.2,
                )
        axes[0].set_ylabel(r'gradient variance $\mu^2 \phi$')
        axes[0].set_ylim(bottom=0)
        save(figure, axes, file)


def draw_rates(study: Mapping[str, Any], done: Done, file: Path) -> None:
    """Metric on tuning images against the rate, SGD and AGVM, if any ran."""
    found = [
        run
        for run in done
        if run.cell.model == SHOWN
        and run.cell.method in COMPARED
        and not run.cell.variant
        and run.seed == study['tune_seed']
    ]
    if not found:
        return
    sizes = sorted({run.cell.batch_size for run in found})
    with plt.rc_context(TEXT):
        figure, axes = plt.subplots(
            1, len(sizes), figsize=(PAGE, 2.4), sharey=True, squeeze=False
        )
        for axis, size in zip(axes[0], sizes):
            axis.set_title(f'batch {size}')
            axis.set_xscale('log', base=2)
            axis.set_xlabel('learning rate')
            for index, (method, label) in enumerate(COMPARED.items()):
                points = sorted(
                    (run.lr, done[run]['metrics']['tune'])
                    for run in found
                    if run.cell == Cell(SHOWN, method, size)
                )
                axis.plot(
                    *zip(*points),
                    color=COLOURS[index],
                    linestyle=DASHES[index],
                    marker='os'[index],
                    label=label,
                    clip_on=False,
                )
            rates = sorted(
                {run.lr for run in found if run.cell.batch_size == size}
            )
            axis.set_xticks(rates, [f'{rate:.2g}' for rate in rates])
            axis.minorticks_off()
            axis.tick_params(axis='x', rotation=60)
        axes[0][0].set_ylabel('box AP, 0: diverged')
        axes[0][0].set_ylim(bottom=0)
        save(figure, axes[0], file)


def save(figure: Any, axes: Sequence[Any], file: Path) -> None:
    """A figure, with the legend of its panels below them."""
    labels: Dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            labels.setdefault(label, handle)
    figure.legend(
        labels.values(),
        labels.keys(),
        loc='lower center',
        ncol=4,
        frameon=False,
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
    fill(args.out, 'survival', survival_table(study, done))
    fill(args.out, 'variants', variants_table(study, done))
    fill(args.out, 'cost', cost_table(done))
    draw(study, done, args.figure)
    rates = args.figure.with_stem(f'{args.figure.stem}_rates')
    draw_rates(study, done, rates)
    runs = list(plan(study, done))
    print(
        f'{args.out}, {args.figure} and {rates}, of {len(done)} runs; the '
        f'study has {len(runs)}'
    )


if __name__ == '__main__':
    main()
