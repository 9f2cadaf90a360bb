"""Results of a study's cells: which are compared, means and spreads."""

import math
from typing import Any, Dict, List, Mapping, Sequence

import numpy as np
from plan import Cell, Done, Result, best_rate, plan

NOT_RUN = 'not run'


def cells_of(study: Mapping[str, Any], done: Done) -> List[Cell]:
    """All cells, in the order of the stages."""
    return list(dict.fromkeys(run.cell for run in plan(study, done)))


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
    deviation = np.std(values, ddof=1)
    return f'{np.mean(values):.3f} ± {deviation:.3f} ({len(values)} seeds)'


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
