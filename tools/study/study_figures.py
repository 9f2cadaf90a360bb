"""Figures of a study's results."""

from pathlib import Path
from typing import Any, Dict, Mapping, Sequence

import numpy as np
from figures import COLOURS, DASHES, PAGE, TEXT, plt
from plan import Cell, Done
from study_results import cells_of, finals, on_test_images, series

#: What is shown.
SHOWN = 'faster_rcnn'
COMPARED = dict(sgd='SGD', agvm_sgd='AGVM')


def draw_variance(study: Mapping[str, Any], done: Done, file: Path) -> None:
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
