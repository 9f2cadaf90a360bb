"""Results of a study's cells: which are compared, means and spreads."""

import math
from dataclasses import replace
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple

import numpy as np
from scipy import stats

from study.plan import Cell, Done, Result, final_rate, plan

NOT_RUN = 'not run'

#: Of two cells, by rate and then seed.
Pairs = Dict[float, Dict[int, Tuple[Result, Result]]]


def cells_of(study: Mapping[str, Any], done: Done) -> List[Cell]:
    """All cells, in the order of the stages."""
    return list(dict.fromkeys(run.cell for run in plan(study, done)))


def ended(result: Result) -> bool:
    """Whether a run did not diverge."""
    return bool(result['status'] == 'ended')


def on_test(result: Result) -> float:
    """On test images."""
    return float(result['metrics']['test'])


def last_loss(result: Result) -> float:
    """Of the last part of a training in which it was logged."""
    return float(next(v for v in reversed(result['loss']) if v is not None))


def paired(done: Done, cell: Cell, other: Cell) -> Pairs:
    """Results of two cells by rate and then seed, where both are there."""
    found: Pairs = {}
    for run, result in done.items():
        same = done.get(replace(run, cell=other))
        if run.cell == cell and same:
            found.setdefault(run.lr or 0.0, {})[run.seed] = result, same
    return dict(sorted(found.items()))


def with_and_without(
    study: Mapping[str, Any], done: Done
) -> Iterator[Tuple[Cell, Cell, Pairs]]:
    """Cells with AGVM, the same without, and their results in pairs."""
    for cell in cells_of(study, done):
        plain = replace(cell, method=cell.method.replace('agvm_', ''))
        pairs = paired(done, cell, plain)
        if plain != cell and not cell.variant and pairs:
            yield cell, plain, pairs


def finals(study: Mapping[str, Any], done: Done, cell: Cell) -> List[Result]:
    """Results of a cell's seeds with the rate that it is judged by."""
    rate = final_rate(study, cell, done)
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
    deviation = np.std(values, ddof=1)
    return f'{np.mean(values):.3f} ± {deviation:.3f} ({len(values)} seeds)'


def on_images(results: Sequence[Result], split: str = 'test') -> str:
    """The metric on a split's images, and how many runs diverged."""
    values = [r['metrics'][split] for r in results if ended(r)]
    diverged = len(results) - len(values)
    if not diverged:
        return mean_and_spread(values)
    if not values:
        return f'{diverged} of {diverged} diverged'
    text = mean_and_spread(values)
    return f'{text}, {diverged} of {len(results)} diverged'


def interval95(values: Sequence[float]) -> str:
    """Mean, and Student's 95 % interval of it where there are several."""
    if not values:
        return '-'
    if len(values) == 1:
        return f'{values[0]:+.3f}'
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    half = stats.t.ppf(0.975, len(values) - 1) * error
    return f'{np.mean(values):+.3f} ± {half:.3f}'


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


def spread(values: Mapping[str, float]) -> float:
    """The largest of some variances over the smallest."""
    return max(values.values()) / min(values.values())
