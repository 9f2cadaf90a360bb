"""Tables of a study's results, in Markdown."""

import operator
from dataclasses import replace
from typing import Any, Dict, List, Mapping, Tuple

import numpy as np

from mmagvm.analysis.markdown import table
from study.plan import (
    Cell,
    Done,
    Run,
    best_rate,
    cells,
    final_rate,
    is_tuned,
    tuning_rates,
)
from study.study_results import (
    NOT_RUN,
    cells_of,
    ended,
    finals,
    interval95,
    last_loss,
    middle_means,
    on_images,
    on_test,
    spread,
    with_and_without,
)

#: Of AP on tuning images, what is no difference to the best rate.
FLAT = 0.01


def results_table(study: Mapping[str, Any], done: Done, model: str) -> str:
    """Test metric by method and batch size, and the loss from the first."""
    found = [
        cell
        for cell in cells_of(study, done)
        if cell.model == model and not cell.variant
    ]
    sizes = sorted({cell.batch_size for cell in found})
    methods = [
        name
        for name, declared in study['methods'].items()
        if any(cell.method == name for cell in found)
        and 'rule' not in declared  # they have a table of their own
    ]
    rows = []
    for method in methods:
        row, reference = [method], None
        for size in sizes:
            cell = Cell(model, method, size)
            rate = final_rate(study, cell, done)
            results = finals(study, done, cell)
            text = on_images(results) if cell in found else '-'
            if results:
                text += f', lr {rate:g}'
            if results and not is_tuned(study, cell):
                text += ' (not tuned)'
            metrics = [on_test(r) for r in results if ended(r)]
            if metrics and size == sizes[0]:
                reference = np.mean(metrics)
            elif metrics and reference is not None:
                text += f', {np.mean(metrics) - reference:+.3f}'
            row.append(text)
        rows.append(row)
    return table(['method', *(f'batch {size}' for size in sizes)], rows)


def tuning_table(study: Mapping[str, Any], done: Done, model: str) -> str:
    """Metric on tuning images by learning rate, one seed each."""
    rows = []
    for cell in cells_of(study, done):
        if cell.model != model or not is_tuned(study, cell) or cell.variant:
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
    """How runs ended, by cell and rate, in stages that try several rates."""
    rows = []
    for stage in study['stages']:
        rates = stage.get('rates', ())
        for rate in rates if len(rates) > 1 else ():
            for cell in cells(stage):
                results = [
                    result
                    for run, result in done.items()
                    if run.cell == cell and run.lr == rate
                ]
                rows.append(
                    [
                        cell.model,
                        cell.method,
                        str(cell.batch_size),
                        cell.variant or '-',
                        f'{rate:g}',
                        on_images(results, 'tune'),
                        on_images(results),
                    ]
                )
    # a cell may be in several stages
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]
    header = ['model', 'method', 'batch', 'variant', 'lr']
    return table([*header, 'tuning', 'test'], rows)


def gain_table(study: Mapping[str, Any], done: Done) -> str:
    """What AGVM changes, by pairs of runs of the same rate and seed.

    A run that diverged has a metric of 0, and counts.
    """
    rows = []
    for cell, _, pairs in with_and_without(study, done):
        for rate, by_seed in pairs.items():
            both = list(by_seed.values())
            kept = [(a, b) for a, b in both if ended(a) and ended(b)]
            rows.append(
                [
                    *(cell.model, cell.method, str(cell.batch_size)),
                    *(f'{rate:g}', str(len(both))),
                    interval95([on_test(a) - on_test(b) for a, b in both]),
                    interval95([last_loss(a) - last_loss(b) for a, b in kept]),
                ]
            )
    header = ['model', 'method', 'batch', 'lr', 'seeds']
    return table([*header, 'test metric', 'training loss at the end'], rows)


def sides_table(study: Mapping[str, Any], done: Done) -> str:
    """In how many of these pairs AGVM is ahead, and by how much, by the rate.

    That is, whether it is below, at or above the best one without AGVM.
    """
    rows = []
    for cell, plain, pairs in with_and_without(study, done):
        best = best_rate(study, plain, done)
        if best is None:
            continue
        row = [cell.model, cell.method, str(cell.batch_size), f'{best:g}']
        for on_side in (operator.lt, operator.eq, operator.gt):
            gains = [
                on_test(a) - on_test(b)
                for rate, by_seed in pairs.items()
                if on_side(rate, best)
                for a, b in by_seed.values()
            ]
            ahead = sum(gain > 0 for gain in gains)
            row.append(
                f'{ahead} of {len(gains)}, {np.mean(gains):+.3f}'
                if gains
                else '-'
            )
        rows.append(row)
    header = ['model', 'method', 'batch', 'best lr without']
    return table([*header, 'below it', 'at it', 'above it'], rows)


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
                if run.cell == cell and run.lr == rate and ended(result)
            ]
            if not results:
                continue
            phis = middle_means(study, results, modulated=False)
            modules += [name for name in phis if name not in modules]
            aligned = middle_means(study, results, modulated=True)
            shown = f'{spread(aligned):.1f}'
            if not study['methods'][cell.method]['modulate']:
                shown = f'{spread(phis):.1f} ({shown})'
            shares = [r.get('clipped') for r in results]
            clipped = [share for share in shares if share is not None]
            rows.append(
                [
                    cell.method,
                    str(cell.batch_size),
                    cell.variant or '-',
                    f'{rate:g}',
                    str(len(results)),
                    *(f'{phis[m]:.2f}' if m in phis else '-' for m in modules),
                    f'{spread(phis):.1f}',
                    shown,
                    f'{100 * np.mean(clipped):.0f} %' if clipped else '-',
                ]
            )
    header = ['method', 'batch', 'variant', 'lr', 'seeds', *modules]
    return table([*header, 'spread of φ', 'spread of μ²φ', 'clipped'], rows)


def variants_table(study: Mapping[str, Any], done: Done) -> str:
    """Test metric of each variant beside runs without, at the same rate."""
    rows = []
    for cell in cells_of(study, done):
        if not cell.variant:
            continue
        found: Dict[float, List[Run]] = {}
        for run in done:
            if run.cell == cell and run.lr is not None:
                found.setdefault(run.lr, []).append(run)
        name = [cell.variant, cell.method, str(cell.batch_size)]
        if not found:
            rows.append([*name, '-', NOT_RUN, NOT_RUN])
        for rate, runs in sorted(found.items()):
            same = [replace(r, cell=replace(cell, variant='')) for r in runs]
            rows.append(
                [
                    *name,
                    f'{rate:g}',
                    on_images([done[run] for run in runs]),
                    on_images([done[r] for r in same if r in done]),
                ]
            )
    return table(
        ['variant', 'method', 'batch', 'lr', 'with it', 'without'], rows
    )


def rules_of(study: Mapping[str, Any]) -> List[str]:
    """The rules for multipliers other than the paper's."""
    return list(
        dict.fromkeys(
            declared['rule']
            for declared in study['methods'].values()
            if 'rule' in declared
        )
    )


def by_rule(study: Mapping[str, Any], cell: Cell) -> List[Cell]:
    """A cell without AGVM, with the paper's rule, and with each other."""
    agvm = replace(cell, method=f'agvm_{cell.method}')
    others = [
        replace(cell, method=f'{agvm.method}_{rule}')
        for rule in rules_of(study)
    ]
    return [cell, agvm, *others]


def rules_table(study: Mapping[str, Any], done: Done) -> str:
    """Test metric with other rules for the multipliers, by optimizer."""
    found = cells_of(study, done)
    rows = []
    for cell in found:
        same = by_rule(study, cell)
        if cell.variant or not any(is_tuned(study, c) for c in same[2:]):
            continue
        row = [cell.method, str(cell.batch_size)]
        for each in same:
            rate = final_rate(study, each, done)
            text = on_images(finals(study, done, each))
            row.append(f'{text}, lr {rate:g}' if rate else text)
        rows.append(row)
    header = ['optimizer', 'batch', 'without AGVM', "the paper's rule"]
    return table([*header, *rules_of(study)], rows)


def rules_at_rates_table(study: Mapping[str, Any], done: Done) -> str:
    """The same at the learning rates that stages give."""
    rows = []
    for stage in study['stages']:
        given = cells(stage) if 'rates' in stage else []
        for cell in cells_of(study, done):
            same = by_rule(study, cell)
            if not any(each in given for each in same[2:]):
                continue
            for rate in stage['rates']:
                row = [cell.model, cell.method, str(cell.batch_size)]
                row.append(f'{rate:g}')
                for each in same:
                    row.append(
                        on_images(
                            [
                                result
                                for run, result in done.items()
                                if (run.cell, run.lr) == (each, rate)
                            ]
                        )
                    )
                rows.append(row)
    header = ['model', 'optimizer', 'batch', 'lr', 'without AGVM']
    return table([*header, "the paper's rule", *rules_of(study)], rows)


def lengths(study: Mapping[str, Any]) -> Dict[str, int]:
    """Epochs by variant, of those that change nothing else."""
    found = {'': int(study['training']['epochs'])}
    for name, changes in study['variants'].items():
        epochs = changes.get('train_cfg', {}).get('max_epochs')
        if epochs:
            found[name] = epochs
    return found


def lengths_table(study: Mapping[str, Any], done: Done) -> str:
    """Test metric of longer trainings, at the rate that was best for one."""
    found = cells_of(study, done)
    epochs_of = lengths(study)
    rows = []
    for cell in found:
        if cell.variant or not any(
            replace(cell, variant=name) in found for name in epochs_of if name
        ):
            continue
        row = [cell.method, str(cell.batch_size)]
        for name in epochs_of:
            longer = replace(cell, variant=name)
            row.append(on_images(finals(study, done, longer)))
        rows.append(row)
    images = study['data']['train']['images']
    header = [
        f'{epochs} epochs ({epochs * images // size} updates)'
        for epochs in epochs_of.values()
        for size in {int(row[1]) for row in rows}
    ]
    return table(['method', 'batch', *header], rows)


def rates_table(study: Mapping[str, Any], done: Done, model: str) -> str:
    """The best rate by method and batch size, and how flat it is there."""
    sizes = sorted({c.batch_size for c in cells_of(study, done)})
    in_percent = study['models'][model]['metric'] == 'mIoU'
    flat = 100 * FLAT if in_percent else FLAT
    rows = []
    for method in study['methods']:
        row = [method]
        for size in sizes:
            cell = Cell(model, method, size)
            best = best_rate(study, cell, done)
            if not is_tuned(study, cell) or best is None:
                row.append('-')
                continue
            metrics = {
                rate: done[Run(cell, rate, study['tune_seed'])]['metrics'][
                    'tune'
                ]
                for rate in tuning_rates(study, cell, done)
            }
            near = [
                rate
                for rate, metric in metrics.items()
                if metric > max(metrics.values()) - flat
            ]
            row.append(f'{best:g} ({min(near):g} to {max(near):g})')
        if any(text != '-' for text in row[1:]):
            rows.append(row)
    return table(['method', *(f'batch {size}' for size in sizes)], rows)


def time_table(study: Mapping[str, Any], done: Done) -> str:
    """Seconds of a training and of an update, of the fastest run of each.

    Other programs only add to a time. Runs are those from a day on, since
    when they had the same machine.
    """
    rows = []
    for cell in cells_of(study, done):
        seconds = [
            result['seconds']
            for run, result in done.items()
            if run.cell == cell
            and ended(result)
            and result['date'] >= study['timed_from']
        ]
        epochs = lengths(study).get(cell.variant)
        if not seconds or not epochs:
            continue
        updates = epochs * study['data']['train']['images'] // cell.batch_size
        rows.append(
            [
                *(cell.model, cell.method, str(cell.batch_size)),
                *(str(epochs), str(updates), str(len(seconds))),
                f'{min(seconds):.0f}',
                f'{min(seconds) / updates:.2f}',
                on_images(finals(study, done, cell)),
            ]
        )
    header = ['model', 'method', 'batch', 'epochs', 'updates', 'runs']
    return table([*header, 'seconds', 'per update', 'test metric'], rows)


def cost_table(done: Done) -> str:
    """AGVM's share of updates' time, from updates of the same run."""
    rows = []
    by_kind: Dict[Tuple[str, str, int, int], List[Dict[str, float]]] = {}
    for run, result in done.items():
        cell, time = run.cell, result.get('update_time')
        if time and ended(result):
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
