"""Compares the errors of AGVM's two estimators of the gradient variance phi.

Records gradients of the quickstart detector at one weight vector, each of its
own batch. Many times, W of them are drawn to stand for the ranks of an update.
phi is estimated from those: by `split`, one half against the other, and by
`pairs`, all against all. Both are compared with phi from all recorded
gradients.
"""

import argparse
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor

from benchmarks.provenance import machine, versions
from mmagvm.analysis.markdown import fill, table
from mmagvm.core.functional import pairs_noise, pairs_variance, split_variance
from mmagvm.strict_json import to_json

ESTIMATORS = ('split', 'pairs')
#: Okabe and Ito's colours, which the colour-blind can distinguish, and
#: markers for print without colour.
STYLES: Dict[str, Dict[str, Any]] = dict(
    split=dict(color='#D55E00', marker='s'),
    pairs=dict(color='#0072B2', marker='o'),
)
CAVEAT = (
    'Truth is the unbiased estimate from all N recorded gradients, itself '
    'uncertain as N is finite. Both estimators are made of inner products, '
    'whose mean over all draws is exactly that truth. Ranks are drawn '
    'without replacement, so draws share gradients. The spread between them '
    'is too small, by a factor from sqrt(1 - W/N) to 1. For the verdict only '
    'the spread of `pairs` is divided by sqrt(1 - W/N), to its disadvantage.'
)


def gram(gradients: Tensor, chunk: int = 65536) -> Tensor:
    """All inner products of (N, d) gradients, (N, N) in float64.

    Norms of any sum of them follow from these, so that draws are cheap.
    """
    products = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for part in gradients.split(chunk, dim=1):
        part = part.double()
        products += part @ part.T
    return products


def truth(products: Tensor, ranks: int) -> Dict[str, float]:
    """phi of ``ranks`` ranks, from the unbiased moments of all gradients."""
    n = len(products)
    local, mean = products.diagonal().mean(), products.mean()
    signal, noise = pairs_noise(local, mean, n)
    phi = 1 - signal / (signal + 2 * noise / ranks)
    return dict(signal=float(signal), noise=float(noise), phi=float(phi))


def estimate(products: Tensor, draws: Tensor, estimator: str) -> Tensor:
    """phi of each of (T, W) draws, (T,)."""
    chosen = products[draws[:, :, None], draws[:, None, :]]
    ranks = draws.shape[1]
    if estimator == 'pairs':
        local = chosen.diagonal(dim1=1, dim2=2).mean(1)
        return pairs_variance(local, chosen.mean((1, 2)), ranks)
    signs = 1 - 2 * (torch.arange(ranks) % 2).double()
    ones = torch.ones_like(signs)
    # |S|^2, |D|^2, |S + D|^2, |S - D|^2 of the signed sums of the ranks
    weights = [ones, signs, ones + signs, ones - signs]
    norms = [torch.einsum('tij,i,j->t', chosen, w, w) for w in weights]
    return split_variance(torch.stack(norms, dim=1))


def compare(
    products: Dict[str, Tensor],
    world_sizes: Sequence[int],
    repetitions: int,
    seed: int = 0,
) -> List[Dict[str, Any]]:
    """A row for each module and number of ranks: both estimators' errors."""
    generator = torch.Generator().manual_seed(seed)
    n = len(next(iter(products.values())))
    rows: List[Dict[str, Any]] = []
    for ranks in world_sizes:
        draws = torch.stack(
            [
                torch.randperm(n, generator=generator)[:ranks]
                for _ in range(repetitions)
            ]
        )
        for module, matrix in products.items():
            row: Dict[str, Any] = dict(
                module=module, ranks=ranks, **truth(matrix, ranks)
            )
            for estimator in ESTIMATORS:
                phi = torch.cat(
                    [
                        estimate(matrix, part, estimator)
                        for part in draws.split(500)
                    ]
                )
                row[estimator] = _errors(phi, row['phi'])
            # only the bounds of the factor are known, see CAVEAT
            inflation = (1 - ranks / n) ** -0.5
            pairs = row['pairs']
            row['pairs_error_at_worst'] = (
                pairs['bias'] ** 2 + (inflation * pairs['std']) ** 2
            ) ** 0.5
            row['pairs_wins'] = (
                row['pairs_error_at_worst'] < row['split']['error']
            )
            rows.append(row)
    return rows


def _errors(phi: Tensor, true: float) -> Dict[str, float]:
    std, bias = float(phi.std()), float(phi.mean()) - true
    return dict(
        mean=float(phi.mean()),
        bias=bias,
        bias_standard_error=std / len(phi) ** 0.5,
        std=std,
        error=(bias**2 + std**2) ** 0.5,
    )


def verdict(rows: List[Dict[str, Any]]) -> str:
    """Whether pairs has the smaller error wherever it differs from split."""
    rows = [row for row in rows if row['ranks'] > 2]
    lost = [
        f'{row["module"]} at {row["ranks"]} ranks'
        for row in rows
        if not row['pairs_wins']
    ]
    gains = [row['split']['error'] / row['pairs']['error'] for row in rows]
    if not lost:
        return (
            f'For more than 2 ranks `pairs` has the smaller error in all '
            f'{len(rows)} cases, {min(gains):.1f} to {max(gains):.1f} times '
            'smaller (root of the mean squared error): it is the better '
            'default.'
        )
    return (
        f'For more than 2 ranks `pairs` has the smaller error in '
        f'{len(rows) - len(lost)} of {len(rows)} cases, not for '
        f"{', '.join(lost)}; split's error over pairs' is "
        f'{min(gains):.2f} to {max(gains):.2f}.'
    )


def tables(results: Dict[str, Any]) -> str:
    """All results as Markdown."""
    settings = results['settings']
    rows = results['rows']
    lines = [
        f'{settings["samples"]} gradients, each of {settings["images"]} '
        f'images, at one weight vector: {results["weights"]}; '
        f'{settings["draws"]} draws for each number of ranks. '
        'Error is the root of the mean squared error.',
        '',
        table(
            (
                'module',
                'ranks',
                'phi',
                *(
                    f'{estimator}: {what}'
                    for estimator in ESTIMATORS
                    for what in ('bias', 'std', 'error')
                ),
                'split error / pairs error',
            ),
            [
                (
                    row['module'],
                    str(row['ranks']),
                    f'{row["phi"]:.4f}',
                    *(
                        f'{row[estimator][what]:.4f}'
                        for estimator in ESTIMATORS
                        for what in ('bias', 'std', 'error')
                    ),
                    f'{row["split"]["error"] / row["pairs"]["error"]:.2f}',
                )
                for row in sorted(rows, key=lambda row: row['module'])
            ],
        ),
        '',
        results['verdict'],
        '',
        CAVEAT,
    ]
    return '\n'.join(lines)


def draw(results: Dict[str, Any]) -> plt.Figure:
    """Estimates above, their errors below, a column for each module."""
    rows = results['rows']
    modules = list(dict.fromkeys(row['module'] for row in rows))
    figure, axes = plt.subplots(
        2,
        len(modules),
        figsize=(3.1 * len(modules), 7),
        sharex=True,
        sharey='row',
        squeeze=False,
        layout='constrained',
    )
    for (top, bottom), module in zip(axes.T, modules):
        own = [row for row in rows if row['module'] == module]
        ranks = [row['ranks'] for row in own]
        top.plot(
            ranks,
            [row['phi'] for row in own],
            color='black',
            linestyle='--',
            label='truth, from all recorded gradients',
        )
        for shift, (estimator, style) in zip((0.95, 1.05), STYLES.items()):
            top.errorbar(
                [shift * w for w in ranks],
                [row[estimator]['mean'] for row in own],
                [row[estimator]['std'] for row in own],
                linestyle='none',
                capsize=3,
                markersize=4,
                label=f'{estimator}: mean and standard deviation',
                **style,
            )
            bottom.plot(
                ranks,
                [row[estimator]['error'] for row in own],
                markersize=4,
                **style,
            )
        top.set_title(module, fontsize='medium')
        bottom.set_yscale('log')
        bottom.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bottom.yaxis.set_major_formatter('{x:g}')
        bottom.yaxis.set_minor_formatter(NullFormatter())
        bottom.set_xscale('log', base=2)
        bottom.set_xticks(ranks, [str(w) for w in ranks])
        bottom.set_xlabel('ranks')
        bottom.grid(alpha=0.3)
        top.grid(alpha=0.3)
    axes[0, 0].set_ylabel(r'gradient variance $\phi$')
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylabel(
        'error of one measurement (root\nmean square; lower is better)'
    )
    settings = results['settings']
    figure.suptitle(
        'One measurement of the gradient variance, by each estimator\n'
        f'quickstart detector, {settings["images"]} images per rank',
    )
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc='outside lower center',
        ncols=3,
        fontsize='small',
    )
    return figure


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--checkpoint',
        type=Path,
        help='of the quickstart (default: work_dirs/quickstart/epoch_4.pth '
        'if it exists, else a short training from random weights)',
    )
    parser.add_argument(
        '--warmup',
        type=int,
        help='number of updates to train, instead of loading a checkpoint',
    )
    parser.add_argument('--data', type=Path, default=Path('data/digits'))
    parser.add_argument('--samples', type=int, default=320)
    parser.add_argument(
        '--images', type=int, default=8, help='images of each batch'
    )
    parser.add_argument(
        '--ranks', type=int, nargs='+', default=[2, 4, 8, 16, 32, 64]
    )
    parser.add_argument('--draws', type=int, default=4000)
    parser.add_argument(
        '--recorded',
        type=Path,
        help='use the inner products of an earlier run, its gram.pth',
    )
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/benchmarks')
    )
    parser.add_argument(
        '--plot', type=Path, help='default: estimator_error.png in --out'
    )
    parser.add_argument(
        '--markdown',
        type=Path,
        help='file to write the table into, between its comments '
        '"estimator_error"',
    )
    return parser.parse_args()


def record_products(args: argparse.Namespace) -> Dict[str, Any]:
    """Record gradients, and return what the analysis needs of them."""
    from benchmarks.record_gradients import (
        CONFIG,
        build,
        reach_weights,
        record,
    )

    checkpoint = args.checkpoint
    usual = Path('work_dirs/quickstart/epoch_4.pth')
    if checkpoint is None and args.warmup is None and usual.exists():
        checkpoint = usual
    model, dataset = build(CONFIG, args.data)
    weights = reach_weights(model, dataset, checkpoint, args.warmup or 300)
    gradients = record(model, dataset, args.samples, args.images)
    return dict(
        weights=weights,
        images=args.images,
        products={name: gram(module) for name, module in gradients.items()},
    )


def main() -> None:
    args = parse_args()
    started = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.recorded is not None:
        recorded = torch.load(args.recorded)
    else:
        recorded = record_products(args)
        torch.save(recorded, args.out / 'gram.pth')
    samples = len(next(iter(recorded['products'].values())))
    if max(args.ranks) > samples // 2:
        raise SystemExit(
            f'--ranks {max(args.ranks)} needs {2 * max(args.ranks)} samples '
            f'or more, but there are {samples}: set --samples'
        )
    rows = compare(recorded['products'], args.ranks, args.draws)
    results = dict(
        machine=machine(),
        versions=versions(),
        settings=dict(
            samples=samples, images=recorded['images'], draws=args.draws
        ),
        weights=recorded['weights'],
        rows=rows,
        verdict=verdict(rows),
        caveat=CAVEAT,
        minutes=(time.time() - started) / 60,
    )
    text = tables(results)
    print(text)
    out = args.out / 'estimator_error.json'
    out.write_text(to_json(results, indent=1))
    plot = args.plot or args.out / 'estimator_error.png'
    draw(results).savefig(plot, dpi=130)
    print(f'\n{results["minutes"]:.1f} min; all figures in {out}, {plot}')
    if args.markdown is not None:
        fill(args.markdown, 'estimator_error', text)


if __name__ == '__main__':
    main()
