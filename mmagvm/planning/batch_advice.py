"""Advises on the batch size, from what AGVM measured in a run.

Reports for each module the batch size at which its gradient stops gaining
(the gradient noise scale of McCandlish et al., "An Empirical Model of
Large-Batch Training", 2018). Also reports which batch size the whole model
tolerates, and the multipliers that AGVM would apply at other batch sizes.
All values have 95 % intervals, unless the run is too short for one.
"""

import re
from dataclasses import dataclass
from functools import reduce
from typing import List, Optional, Sequence, Tuple

import numpy as np

from mmagvm.analysis.markdown import table
from mmagvm.analysis.run_log import Run
from mmagvm.errors import UsageError
from mmagvm.planning.batch_means import (
    BLOCKS,
    DRIFT,
    LEAST_PER_BLOCK,
    block_means,
    draw_means,
    drift,
    interval,
)
from mmagvm.planning.noise_scales import (
    lr_scale_at,
    measurements_needed,
    noise_scale,
    variance_at,
)

#: From this ratio of its ends on, an interval gives no advice.
TOO_WIDE = 4.0


@dataclass
class Measured:
    """What a run measured, in the part of it that is used.

    Symbols are those of noise_scales.py.

    Args:
        batch_size: B.
        modules: Their names.
        steps: (n,) iterations of the measurements.
        cosines: (n, h), c.
        lr_scale: (h,) average of mu that was in force.
        logged: (h,) rho as AGVM logged it, infinite where it showed no
            signal; NaN where it logged none.
        total: Measurements logged in the whole run.
    """

    batch_size: int
    modules: List[str]
    steps: np.ndarray
    cosines: np.ndarray
    lr_scale: np.ndarray
    logged: np.ndarray
    total: int


# -- reading the run


def read_batch_size(run: Run) -> int:
    """B, as AGVM logged it at the start of the run's last part."""
    for log in reversed(run.logs):
        found = re.findall(
            r'AGVM: batch size (\d+) =', log.read_text(errors='replace')
        )
        if found:
            return int(found[-1])
    raise UsageError(
        f'{run.work_dir}: no log has the batch size: give the images per '
        'update, over all GPUs and micro-batches, with --batch-size'
    )


def read_measured(run: Run, batch_size: int, begin: Optional[int]) -> Measured:
    """The measurements from iteration ``begin``, or their second half.

    Args:
        run: Of which work dir.
        batch_size: B.
        begin: First iteration to use; None for the second half, since the
            noise scale grows while a model learns.
    """
    series = run.by_module('variance')
    # leave out modules without a gradient throughout the run, and modules
    # that a resumed run no longer has
    modules = [m for m in run.modules if np.isfinite(series[m][1]).any()]
    last = max((series[m][0][-1] for m in modules), default=0)
    modules = [m for m in modules if series[m][0][-1] == last]
    steps = reduce(
        np.intersect1d, [series[m][0] for m in modules] or [np.zeros(0)]
    )
    used = np.ones(len(steps), dtype=bool)
    if begin is not None:
        used = steps >= begin
    else:
        used[: len(steps) // 2] = False
    count, least = int(used.sum()), BLOCKS * LEAST_PER_BLOCK
    if count < least:
        part = 'second half' if begin is None else f'part from --begin {begin}'
        raise UsageError(
            f'{run.work_dir}: the run is too short: the {part} has {count} '
            f'logged measurements, {least} are needed. Train longer, measure '
            'more often (optim_wrapper.interval) and log each measurement '
            '(default_hooks.logger.interval), or use more of them with --begin'
        )

    # as many as blocks of the same length have
    used[np.flatnonzero(used)[: count % BLOCKS]] = False

    def values(quantity: str, module: str) -> np.ndarray:
        at, found = run.by_module(quantity).get(module, (steps[:0],) * 2)
        return found[np.isin(at, steps[used])]

    phi = np.stack([values('variance', m) for m in modules], 1)
    # a run that was resumed with another estimator has it in one part only
    logged = [values('noise_scale', m) for m in modules]
    return Measured(
        batch_size,
        modules,
        steps[used],
        1 - phi,
        np.array([values('lr_scale', m).mean() for m in modules]),
        np.array([rho[-1] if len(rho) else np.nan for rho in logged]),
        len(steps),
    )


# -- reporting


def number(value: float) -> str:
    """Images to two digits, which is more than any run can resolve."""
    if not np.isfinite(value):
        return 'no bound' if np.isinf(value) else '-'
    return f'{float(f"{value:.2g}"):,.0f}' if value >= 10 else f'{value:.1f}'


def with_interval(value: float, low: float, high: float) -> str:
    """``value (low to high)``."""
    return f'{value:.2f} ({low:.2f} to {high:.2f})'


def noise_table(
    measured: Measured, cosine: np.ndarray, draws: np.ndarray
) -> str:
    """The noise scale of each module, and how well it is known."""
    batch = measured.batch_size
    value = noise_scale(cosine, batch)
    low, high = interval(noise_scale(draws, batch))
    drifts = drift(measured.cosines)
    rows = []
    for i, module in enumerate(measured.modules):
        if not np.isfinite(high[i]):
            verdict = f'at least {number(low[i])}; run too short for more'
        elif high[i] > TOO_WIDE * low[i]:
            verdict = 'its order of magnitude'
        else:
            verdict = 'known'
        if drifts[i] > DRIFT:
            verdict += '; it drifts'
        rows.append(
            (
                module,
                f'{1 - cosine[i]:.3f}',
                number(value[i]),
                f'{number(low[i])} to {number(high[i])}',
                number(measured.logged[i]),
                verdict,
            )
        )
    return table(
        (
            'module',
            f'phi at {batch}',
            'noise scale',
            '95 %',
            'as logged',
            'what is known',
        ),
        rows,
    )


def scale_table(
    measured: Measured,
    cosine: np.ndarray,
    draws: np.ndarray,
    batches: Sequence[int],
    anchor: int,
    settings: Tuple[float, Tuple[float, float]],
) -> str:
    """Gain of a step and multipliers at several batches."""
    rows = []
    for batch in batches:
        old = measured.batch_size
        # 1 / (1 + rho / B'), of the module that gains least from more images
        gain = 1 - variance_at(cosine.max(), old, 2 * batch)
        scale = lr_scale_at(cosine, old, batch, anchor, *settings)
        low, high = interval(lr_scale_at(draws, old, batch, anchor, *settings))
        rows.append(
            (
                f'{batch:,}',
                f'{gain:.2f}',
                *(
                    with_interval(scale[i], low[i], high[i])
                    for i in range(len(cosine))
                    if i != anchor
                ),
            )
        )
    return table(
        (
            'batch',
            f'gain of {measured.modules[int(cosine.argmax())]}',
            *(
                f'mu of {module}'
                for i, module in enumerate(measured.modules)
                if i != anchor
            ),
        ),
        rows,
    )


def advise(
    measured: Measured,
    anchor: str,
    eps: float,
    ratio_range: Tuple[float, float],
    batches: Sequence[int],
    modulated: bool = True,
    bounded: bool = False,
) -> str:
    """The whole advice, as text.

    Args:
        measured: Of a run.
        anchor: The module that the others follow.
        eps: As AGVM's.
        ratio_range: As AGVM's.
        batches: At which mu is predicted; the run's own is added.
        modulated: Whether the run applied its multipliers.
        bounded: Whether it has ``bound_by_grad_norm``.
    """
    old = measured.batch_size
    cosines = measured.cosines
    draws = draw_means(cosines)
    cosine = block_means(cosines, BLOCKS).mean(0)
    modules = measured.modules
    lines = [
        f'{len(cosines)} of {measured.total} logged measurements, iterations '
        f'{measured.steps[0]:.0f} to {measured.steps[-1]:.0f}, at batch {old}',
        '',
        noise_table(measured, cosine, draws),
        '',
    ]
    if (drift(cosines) > DRIFT).any():
        lines.append(
            'Where it drifts, this is an average over a change, for instance '
            'of the learning rate: choose a part without one with --begin'
        )
    low, high = interval(draws)
    for i, module in enumerate(modules):
        if cosine[i] <= 0:
            lines.append(
                f'{module}: |G|^2 is estimated as negative: its noise scale '
                'is undefined, only its lower bound counts'
            )
        elif low[i] <= 0:
            needed = measurements_needed(cosine[i], low[i], len(cosines))
            lines.append(
                f'{module}: an upper bound would take about {needed} '
                'measurements'
            )
    logged = measured.logged
    scale_low, scale_high = (noise_scale(c, old) for c in (high, low))
    outside = [
        module
        for i, module in enumerate(modules)
        if logged[i] < scale_low[i] or logged[i] > scale_high[i]
    ]
    if outside:
        lines.append(
            'Outside the interval is what AGVM logged at the end, a ratio of '
            f'moving averages, for {", ".join(outside)}: the noise scale or '
            'the size of gradients changes'
        )
    if np.isnan(logged).all():
        lines.append(
            "estimator='split' logs no noise scale: it is computed from phi, "
            "with a larger error than that of estimator='pairs'"
        )
    lines += ['', whole_model(measured, cosine, draws), '']
    index = modules.index(anchor)
    lines += [
        'Gain of a step in the module with the least noise, relative to a '
        'step with all images; and the expected multipliers, relative to '
        f'{anchor}:',
        '',
        scale_table(
            measured,
            cosine,
            draws,
            sorted({old, *batches}),
            index,
            (eps, ratio_range),
        ),
        '',
        f'Average multipliers of the run itself, at {old}: '
        + ', '.join(
            f'{module} {value:.2f}'
            for module, value in zip(modules, measured.lr_scale)
            if module != anchor
        )
        + '. They differ from the expected ones: single measurements '
        'scatter, so the average of a root of a ratio is larger than the '
        'root of a ratio of averages, and the moving average lags',
    ]
    if not modulated:
        lines.append('modulate=False: the run did not apply them')
    if bounded:
        lines.append(
            'bound_by_grad_norm=True lowers those of the run, which the '
            'expected ones leave out'
        )
    return '\n'.join(lines)


def whole_model(
    measured: Measured, cosine: np.ndarray, draws: np.ndarray
) -> str:
    """Up to which batch sizes modules have less than half of the gain."""
    old = measured.batch_size
    # the largest cosine has the smallest noise scale
    first, last = int(cosine.argmax()), int(cosine.argmin())
    low, high = map(float, interval(noise_scale(draws.max(1), old)))
    text = (
        f'Whole model: up to a batch of {number(low)}, every module has less '
        'than half of the gain of a step with all images, so more images pay'
    )
    if not np.isfinite(high):
        return text + '. The run is too short for an upper limit'
    end = float(noise_scale(cosine[last], old))
    most = f'{number(end)} images' if np.isfinite(end) else 'any batch'
    return (
        f'{text}. Beyond {number(high)}, {measured.modules[first]} has more '
        'than half (best estimate '
        f'{number(float(noise_scale(cosine[first], old)))}). '
        f'{measured.modules[last]} has less than half up to {most}'
    )
