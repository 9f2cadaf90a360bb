"""Figures of a study's results."""

import math
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Set

import matplotlib.pyplot as plt
import numpy as np

from mmagvm.analysis.figures import COLOURS, DASHES, MARKERS, PAGE, TEXT
from study.plan import Cell, Done, best_rate, is_tuned
from study.study_results import (
    cells_of,
    ended,
    finals,
    middle_means,
    on_images,
    on_test,
    series,
    spread,
)

#: Entries beside each other, and inches of a row of them.
LEGEND_COLUMNS, LEGEND_ROW = 4, 0.15
#: What is shown.
SHOWN = 'faster_rcnn'
COMPARED = dict(sgd='SGD', agvm_sgd='AGVM')
#: Ticks of ratios of variances.
RATIOS = (1, 2, 4, 8)
#: Batch sizes whose variances are shown, and between which a loss is set
#: against a spread.
ALIGNED = (32, 256)
#: How methods are called, in the order of drawing.
METHODS = dict(
    soap='SOAP',
    soap_8='SOAP, $\\beta_1$ = 0.8',
    muon='Muon',
    adamw='AdamW',
    pmd_lamb='PMD-LAMB',
    lamb='LAMB',
    sgd='SGD',
    lars='LARS',
    agvm_soap='AGVM + SOAP',
    agvm_muon='AGVM + Muon',
    agvm_adamw='AGVM + AdamW',
    agvm_sgd='AGVM + SGD',
)
#: Drawn against the batch size: those that run at every one.
AT_ALL_SIZES = (
    *('soap', 'soap_8', 'muon', 'adamw', 'pmd_lamb', 'sgd'),
    *('agvm_soap', 'agvm_sgd'),
)


def draw_variance(study: Mapping[str, Any], done: Done, file: Path) -> None:
    """Variance by module over the training: small batch, large, and AGVM."""
    sizes = [
        cell.batch_size
        for cell in cells_of(study, done)
        if cell == Cell(SHOWN, 'agvm_sgd', cell.batch_size)
        and cell.batch_size <= ALIGNED[1]  # beyond it SGD learns nothing
        and finals(study, done, cell)
    ]
    if not sizes:
        return
    smallest, largest = min(sizes), max(sizes)
    panels = [('sgd', smallest), ('sgd', largest), ('agvm_sgd', largest)]
    epochs = study['training']['epochs']
    with plt.rc_context(TEXT):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(PAGE, 2.4), sharex=True, sharey=True
        )
        for axis, (method, size) in zip(axes, panels):
            # the same rate for AGVM, as phi depends on it
            rate = best_rate(study, Cell(SHOWN, 'sgd', size), done)
            results = [
                result
                for run, result in done.items()
                if run.cell == Cell(SHOWN, method, size) and run.lr == rate
            ]
            metric = on_images(results)
            results = [r for r in results if r['status'] == 'ended']
            modulated = study['methods'][method]['modulate']
            shown = 'rate not known' if rate is None else f'lr {rate:g}'
            axis.set_title(
                f'{COMPARED[method]}, batch {size}, {shown}\nbox AP {metric}'
            )
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


def draw_batch_sizes(study: Mapping[str, Any], done: Done, file: Path) -> None:
    """Test metric against the batch size, a line for each method.

    At each tuned rate: the mean over seeds, and their range as a bar. While a
    rate is being tuned, the run that is best on tuning images, hollow.
    """
    with plt.rc_context(TEXT):
        figure, axis = plt.subplots(figsize=(PAGE, 3.2))
        ticks: Set[float] = set()
        for index, method in enumerate(AT_ALL_SIZES):
            label = METHODS[method]
            found: Dict[int, List[float]] = {}
            tuning: Dict[int, float] = {}
            for cell in cells_of(study, done):
                if cell != Cell(
                    SHOWN, method, cell.batch_size
                ) or not is_tuned(study, cell):
                    continue
                results = list(filter(ended, finals(study, done, cell)))
                if results:
                    found[cell.batch_size] = [on_test(r) for r in results]
                    continue
                tried = [r for run, r in done.items() if run.cell == cell]
                if tried:
                    best = max(tried, key=lambda r: r['metrics']['tune'])
                    tuning[cell.batch_size] = on_test(best)
            style: Dict[str, Any] = dict(
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
            )
            # beside those of other methods
            shift = 2 ** (0.03 * (index - len(AT_ALL_SIZES) / 2))
            if tuning:
                ticks.update(tuning)
                axis.plot(
                    [shift * size for size in tuning],
                    list(tuning.values()),
                    linestyle='',
                    fillstyle='none',
                    label=f'{label}, tuning not finished',
                    **style,
                )
            points = sorted(found.items())
            if not points:
                continue
            sizes = np.array([size for size, _ in points], dtype=float)
            means = np.array([np.mean(values) for _, values in points])
            ends = np.array([(min(v), max(v)) for _, v in points])
            ticks.update(sizes)
            axis.errorbar(
                shift * sizes,
                means,
                yerr=np.abs(ends - means[:, None]).T,
                linestyle=DASHES[index % len(DASHES)],
                linewidth=1.2,
                elinewidth=0.8,
                label=label,
                **style,
            )
        axis.set_xscale('log', base=2)
        axis.set_xticks(
            sorted(ticks), [f'{int(size)}' for size in sorted(ticks)]
        )
        axis.minorticks_off()
        axis.set_xlabel('batch size (12 epochs at each)')
        axis.set_ylabel('test box AP')
        axis.set_ylim(bottom=0)
        save(figure, [axis], file)


def draw_alignment(study: Mapping[str, Any], done: Done, file: Path) -> None:
    """What a large batch loses, against how far apart the variances are.

    A point for each method: the spread of the gradient variances at the
    largest batch that all have, each measured in its optimizer's own metric
    and at the learning rate of its module, and the test metric lost from the
    smallest batch to it.
    """
    small, large = ALIGNED
    with plt.rc_context(TEXT):
        figure, axis = plt.subplots(figsize=(PAGE, 3.2))
        for index, (method, label) in enumerate(METHODS.items()):
            at_small, at_large = (
                list(filter(ended, finals(study, done, cell)))
                for cell in (
                    Cell(SHOWN, method, small),
                    Cell(SHOWN, method, large),
                )
            )
            if not at_small or not at_large:
                continue
            modulated = study['methods'][method]['modulate']
            apart = spread(middle_means(study, at_large, modulated))
            lost = np.mean([on_test(r) for r in at_small]) - np.mean(
                [on_test(r) for r in at_large]
            )
            axis.plot(
                apart,
                lost,
                linestyle='',
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                label=label,
            )
        axis.set_xscale('log', base=2)
        axis.set_xticks(RATIOS, [str(ratio) for ratio in RATIOS])
        axis.set_xlabel(
            f'largest over smallest gradient variance at batch {large}'
        )
        axis.set_ylabel(f'test box AP lost from batch {small} to {large}')
        axis.set_xlim(1, RATIOS[-1])
        axis.set_ylim(bottom=0)
        save(figure, [axis], file)


def draw_rates(study: Mapping[str, Any], done: Done, file: Path) -> None:
    """Test metric against the rate: a point for each run, a line of means.

    Of batch sizes with several rates.
    """
    found = {
        run: result['metrics']['test']
        for run, result in done.items()
        if run.cell.model == SHOWN
        and run.cell.method in COMPARED
        and not run.cell.variant
    }
    tried = [size for size, _ in {(r.cell.batch_size, r.lr) for r in found}]
    sizes = sorted(size for size in {*tried} if tried.count(size) > 1)
    if not sizes:
        return
    with plt.rc_context(TEXT):
        figure, axes = plt.subplots(
            1, len(sizes), figsize=(PAGE, 2.4), sharey=True, squeeze=False
        )
        for axis, size in zip(axes[0], sizes):
            axis.set_title(f'batch {size}')
            axis.set_xscale('log', base=2)
            axis.set_xlabel('learning rate')
            shown = set()
            for index, (method, label) in enumerate(COMPARED.items()):
                by_rate: Dict[float, List[float]] = {}
                for run, metric in found.items():
                    own = run.cell == Cell(SHOWN, method, size)
                    if own and run.lr is not None:
                        by_rate.setdefault(run.lr, []).append(metric)
                rates = sorted(by_rate)
                shown.update(rates)
                style = dict(color=COLOURS[index], clip_on=False)
                for rate in rates:
                    axis.plot(
                        # beside those of the other method
                        [rate * (0.98, 1.02)[index]] * len(by_rate[rate]),
                        by_rate[rate],
                        marker='os'[index],
                        linestyle='',
                        markersize=4,
                        fillstyle='none',
                        **style,
                    )
                axis.plot(
                    rates,
                    [np.mean(by_rate[rate]) for rate in rates],
                    linestyle=DASHES[index],
                    label=label,
                    **style,
                )
            ticks = sorted(shown)
            axis.set_xticks(ticks, [f'{rate:.2g}' for rate in ticks])
            axis.minorticks_off()
            axis.tick_params(axis='x', rotation=60)
        axes[0][0].set_ylabel('test box AP')
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
        ncol=LEGEND_COLUMNS,
        frameon=False,
    )
    rows = math.ceil(len(labels) / LEGEND_COLUMNS)
    below = (LEGEND_ROW * rows + 0.05) / figure.get_size_inches()[1]
    figure.tight_layout(rect=(0, below, 1, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=300)
    plt.close(figure)
