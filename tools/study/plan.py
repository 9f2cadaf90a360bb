"""Which runs a study is made of, given the results that there are."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional

Result = Dict[str, Any]
#: Best metric by run, of those that have ended.
Done = Mapping['Run', Result]


@dataclass(frozen=True)
class Cell:
    """Runs that differ in learning rate and seed only."""

    model: str
    method: str
    batch_size: int
    variant: str = ''


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        cell: What is trained, how.
        lr: Learning rate after warm-up; None while it is not known, because
            it is being tuned.
        seed: Of weights that are not pretrained, and of the order of images.
    """

    cell: Cell
    lr: Optional[float]
    seed: int

    @property
    def name(self) -> str:
        """For folders and messages."""
        parts = [
            self.cell.model,
            self.cell.method,
            str(self.cell.batch_size),
            *([self.cell.variant] if self.cell.variant else []),
            f'lr{self.lr:g}' if self.lr is not None else 'lr-unknown',
            f'seed{self.seed}',
        ]
        return '_'.join(parts)

    def to_dict(self) -> Dict[str, Any]:
        """Flat, for JSON."""
        return dict(asdict(self.cell), lr=self.lr, seed=self.seed)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> 'Run':
        """From what :meth:`to_dict` gave, other keys beside it."""
        cell = Cell(
            **{
                name: values[name]
                for name in ('model', 'method', 'batch_size', 'variant')
            }
        )
        return cls(cell, values['lr'], values['seed'])


def fingerprint(study: Mapping[str, Any], cell: Cell) -> str:
    """Of all that is declared of a cell's runs but their rates and seeds."""
    parts = [study[name] for name in ('data', 'pretraining', 'training')]
    parts += [
        study['models'][cell.model],
        {**study['methods'][cell.method], 'rates': None},
        study['variants'].get(cell.variant),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def by_run(
    study: Mapping[str, Any], results: Iterable[Result]
) -> Dict[Run, Result]:
    """Results by their run.

    Left out are those that failed for reasons of the machine's, and those of
    what is declared otherwise now.
    """
    runs = {}
    for result in results:
        run = Run.from_dict(result)
        if (
            result['status'] != 'failed'
            and run.cell.model in study['models']
            and run.cell.method in study['methods']
            and result.get('declaration') == fingerprint(study, run.cell)
        ):
            runs[run] = result
    return runs


def cells(stage: Mapping[str, Any]) -> List[Cell]:
    """Of a stage, in order."""
    return [
        Cell(model, method, batch_size, variant)
        for model in stage['models']
        for batch_size in stage['batch_sizes']
        for variant in stage.get('variants', [''])
        for method in stage['methods']
    ]


def tuning_rates(
    study: Mapping[str, Any], cell: Cell, done: Done
) -> List[float]:
    """The rates to try for a cell, given what was found so far.

    The grid of its method, or the model's own; while the best is the lowest
    or the highest of all tried, the next one beyond, at most ``grid_moves``
    times; and at last the best one times each of ``grid_refinement``.
    """
    own = study['model_rates'].get(cell.model, {})
    usual = study['methods'][cell.method]['rates']
    rates = sorted(own.get(cell.method, usual))
    for _ in range(study['grid_moves']):
        best = best_rate(study, cell, done, rates)
        if best == rates[0]:
            rates.insert(0, rates[0] / 2)
        elif best == rates[-1]:
            rates.append(rates[-1] * 2)
        else:
            break
    best = best_rate(study, cell, done, rates)
    if best is not None:
        # rounded, so that they are read back from results as they are
        near = [float(f'{best * by:.3g}') for by in study['grid_refinement']]
        rates = sorted({*rates, *near})
    return rates


def best_rate(
    study: Mapping[str, Any],
    cell: Cell,
    done: Done,
    rates: Optional[List[float]] = None,
) -> Optional[float]:
    """The tuned rate of a cell; None until all its rates have been tried.

    Args:
        study: The declaration.
        cell: Its variant is left out: it takes the rate without.
        done: Results by run.
        rates: To choose from. Defaults to all to be tried.
    """
    cell = Cell(cell.model, cell.method, cell.batch_size)
    rates = rates or tuning_rates(study, cell, done)
    runs = [Run(cell, rate, study['tune_seed']) for rate in rates]
    if any(run not in done for run in runs):
        return None
    return max(
        zip(rates, runs), key=lambda pair: done[pair[1]]['metrics']['tune']
    )[0]


def is_tuned(study: Mapping[str, Any], cell: Cell) -> bool:
    """Whether a stage looks for the cell's rate, instead of giving it."""
    return any(
        replace(cell, variant='') == replace(declared, variant='')
        for stage in study['stages']
        if 'rates' not in stage
        for declared in cells(stage)
    )


def final_rate(
    study: Mapping[str, Any], cell: Cell, done: Done
) -> Optional[float]:
    """The tuned rate of a cell, or the only one that stages give it."""
    if is_tuned(study, cell):
        return best_rate(study, cell, done)
    given = {
        rate
        for stage in study['stages']
        if cell in cells(stage)
        for rate in stage.get('rates', ())
    }
    return given.pop() if len(given) == 1 else None


def plan(study: Mapping[str, Any], done: Done) -> Iterator[Run]:
    """All runs of a study in order, also those that are done.

    A run whose rate is not known yet has ``lr=None``.
    """
    seen = set()
    for stage in study['stages']:
        if 'rates' in stage:
            runs = [
                Run(cell, rate, seed)
                for rate in stage['rates']
                for cell in cells(stage)
                for seed in stage['seeds']
            ]
        else:
            tuned = {
                Cell(cell.model, cell.method, cell.batch_size): None
                for cell in cells(stage)
            }
            runs = [
                Run(cell, rate, study['tune_seed'])
                for cell in tuned
                for rate in tuning_rates(study, cell, done)
            ]
            runs += [
                Run(cell, best_rate(study, cell, done), seed)
                for cell in cells(stage)
                for seed in stage['seeds']
            ]
        for run in runs:
            if run not in seen:
                seen.add(run)
                yield run
