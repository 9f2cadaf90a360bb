"""Figures of runs; plot_variance.py and report.py draw them."""

import math
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    List,
    Optional,
    Sequence,
    Tuple,
)

import matplotlib
import numpy as np

from mmagvm.analysis.run_log import Run, Series

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import (  # noqa: E402
    LogLocator,
    MaxNLocator,
    NullFormatter,
    StrMethodFormatter,
)

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType  # not in every version

#: Okabe and Ito's colours, which the colour-blind can distinguish. Dashes and
#: markers distinguish lines without colour: no two of 12 share all three.
COLOURS = ['#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00']
DASHES = ['-', (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1.5, 1))]
MARKERS = 'osD^v<>Pp*hX'

#: Inches, the sizes in which a paper prints figures.
COLUMN, PAGE = 3.4, 7.0
TEXT: 'Dict[RcKeyType, Any]' = {
    'font.size': 7.5,
    'axes.titlesize': 8,
    'legend.fontsize': 7,
    'legend.title_fontsize': 7,
    'axes.linewidth': 0.6,
    'axes.grid': True,
    'grid.color': '#dddddd',
    'grid.linewidth': 0.4,
}


@dataclass
class Quantity:
    """A quantity that a figure shows for every module.

    Attributes:
        label: Of the y axis.
        log: Whether the axis is logarithmic.
        reference: Where a thin line is drawn, if anywhere.
    """

    label: str
    log: bool = False
    reference: Optional[float] = None


QUANTITIES = {
    'variance': Quantity(r'variance $\phi$', reference=1),
    'ratio': Quantity(r'$\phi$ / $\phi$ of anchor', log=True, reference=1),
    'lr_scale': Quantity(r'lr_scale $\mu$', reference=1),
    'lr': Quantity('learning rate in force', log=True),
    'noise_scale': Quantity('noise scale [images]', log=True),
}

#: Quantities of single measurements, drawn raw (faint) and smoothed. The
#: others are already smooth.
NOISY = ('variance',)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred running mean, over fewer values at both ends.

    Means skip values that are not finite; where there is no other, a gap
    remains.
    """
    finite = np.isfinite(values)
    kernel = np.ones(min(width, len(values)))
    count = np.convolve(finite, kernel, 'same')
    total = np.convolve(np.where(finite, values, 0), kernel, 'same')
    return np.where(finite, total / np.maximum(count, 1), np.nan)


def smoothing_width(run: Run) -> int:
    """Width of running means: odd, about an eighth of the values."""
    lengths = [len(steps) for steps, _ in run.by_module('variance').values()]
    return 2 * (max(lengths, default=0) // 16) + 1


def module_series(run: Run, name: str) -> Dict[str, Series]:
    """The series of every module that a figure shows, unsmoothed."""
    if name in ('variance', 'lr_scale', 'noise_scale'):
        return run.by_module(name)
    if name == 'lr':
        return _learning_rates(run)
    width = smoothing_width(run)
    phis = run.by_module('variance')
    if run.anchor not in phis:
        return {}
    steps, anchor = phis[run.anchor]
    anchor = smooth(anchor, width)
    return {
        module: (
            steps,
            smooth(phi, width) / np.where(anchor > 0, anchor, np.nan),
        )
        for module, (own, phi) in phis.items()
        if np.array_equal(own, steps)
    }


def _learning_rates(run: Run) -> Dict[str, Series]:
    """The schedule's learning rate times lr_scale, at every logged line."""
    # lr is of the first group, where paramwise_cfg may have changed it
    lr_at = dict(
        zip(*run.series.get('base_lr', run.series.get('lr', ((), ()))))
    )
    found = {}
    for module in run.modules:
        steps, scale = run.series.get(f'agvm_lr_scale/{module}', ((), ()))
        if not run.setting('modulate', True):
            scale = np.ones(len(steps))
        kept = [i for i, step in enumerate(steps) if step in lr_at]
        if kept:
            found[module] = (
                np.asarray(steps)[kept],
                np.array([lr_at[steps[i]] * scale[i] for i in kept]),
            )
    return found


def missing(run: Run, name: str) -> str:
    """Why a run lacks a quantity, for its panel."""
    if not run.modules:
        return 'trained without AGVM'
    if (
        name == 'noise_scale'
        and f'agvm_{name}/{run.modules[0]}' not in run.series
    ):
        return "not logged:\nonly estimator='pairs'\nmeasures it"
    if name == 'lr':
        return 'no learning rate was logged'
    if name == 'ratio' and run.anchor is None:
        return 'its anchor was not logged'
    return 'no measurement was logged'


def remarks(runs: Sequence[Run], names: Sequence[str]) -> List[str]:
    """Remarks on the figures, a line for each unexpected fact."""
    lines = []
    longest = max(run.last_step for run in runs)
    for run in runs:
        if run.last_step < longest:
            lines.append(
                f'{run.name}: ends at iteration {run.last_step}, the longest '
                f'run at {longest}'
            )
        if run.modules and 'agvm/measured' not in run.series:
            lines.append(
                f'{run.name}: agvm/measured was not logged, so every logged '
                'line counts as a measurement'
            )
        if not run.modules:
            lines.append(f'{run.name}: {missing(run, names[0])}')
            continue
        if not run.setting('modulate', True):
            lines.append(f'{run.name}: modulate=False, lr_scale not applied')
        for name in names:
            series = module_series(run, name)
            if not series:
                text = missing(run, name).replace('\n', ' ')
                lines.append(f'{run.name}: no {name}: {text}')
            for module in run.modules:
                if series and module not in series:
                    lines.append(f'{run.name}: no {name} of {module}')
            for module, (_, values) in series.items():
                gaps = int(np.sum(~np.isfinite(values)))
                if gaps and name != 'ratio':
                    lines.append(
                        f'{run.name}: {name} of {module} has gaps: it is NaN '
                        f'or infinite in {gaps} of {len(values)} measurements'
                    )
    return lines


def module_styles(runs: Sequence[Run]) -> Dict[str, Dict[str, Any]]:
    """One style for each module of any run, the anchor's first."""
    modules: Dict[str, None] = {}
    for run in runs:
        if run.anchor:
            modules.setdefault(run.anchor)
    for run in runs:
        for module in run.modules:
            modules.setdefault(module)
    return {module: line_style(i) for i, module in enumerate(modules)}


def line_style(i: int) -> Dict[str, Any]:
    """Colour, dashes and marker of the i-th line of a figure."""
    return dict(
        color=COLOURS[i % len(COLOURS)],
        linestyle=DASHES[(i + i // len(COLOURS)) % len(DASHES)],
        marker=MARKERS[i % len(MARKERS)],
        markersize=3,
        linewidth=1.1,
    )


def draw(
    runs: Sequence[Run],
    names: Sequence[str],
    styles: Optional[Dict[str, Dict[str, Any]]] = None,
    limits: Optional[Dict[str, Tuple[float, float]]] = None,
) -> plt.Figure:
    """A figure with a panel for every run, or for several quantities of one.

    Panels of several runs share their axes.

    Args:
        runs: Several, or one.
        names: One of :data:`QUANTITIES`, or several if there is one run.
        styles: Of :func:`module_styles`. Defaults to these runs' own.
        limits: Of :func:`axis_limits`. Defaults to these runs' own.
    """
    styles = styles or module_styles(runs)
    limits = limits or axis_limits(runs, names)
    panels = [(run, name) for name in names for run in runs]
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    width = COLUMN if columns == 1 else PAGE
    per_row = max(1, int(width / (0.055 * max(map(len, styles)) + 0.55)))
    legend = 0.15 * math.ceil(len(styles) / per_row) + 0.25
    panel = max(1.5, 0.62 * width / columns)
    with plt.rc_context(TEXT):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(width, rows * panel + legend),
            sharex=True,
            sharey=len(names) == 1,
            squeeze=False,
            layout='constrained',
        )
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        for i, (axis, (run, name)) in enumerate(zip(axes.flat, panels)):
            _draw_panel(axis, run, name, styles, limits[name])
            axis.set_xlim(limits['x'])
            if len(names) == 1:
                axis.set_title(run.name)
            if i % columns == 0 or len(names) > 1:
                axis.set_ylabel(QUANTITIES[name].label)
            if i + columns >= len(panels):
                axis.set_xlabel('iteration')
                axis.tick_params(labelbottom=True)
        if len(names) > 1:
            figure.suptitle(runs[0].name, fontsize=TEXT['axes.titlesize'])
        figure.legend(
            handles=[
                plt.Line2D([], [], label=module, **style)
                for module, style in styles.items()
            ],
            loc='outside lower center',
            ncols=per_row,
            handlelength=3,
            frameon=False,
            borderpad=0,
            columnspacing=1.2,
        )
    return figure


def _draw_panel(
    axis: plt.Axes,
    run: Run,
    name: str,
    styles: Dict[str, Dict[str, Any]],
    limits: Tuple[float, float],
) -> None:
    quantity = QUANTITIES[name]
    if quantity.log:
        axis.set_yscale('log')
        low, high = limits
        subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
        axis.yaxis.set_major_locator(
            # two of these may be further apart than the limits
            MaxNLocator(4) if high / low < 5 else LogLocator(subs=subs)
        )
        axis.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(limits)
    if quantity.reference is not None:
        axis.axhline(quantity.reference, color='#777777', linewidth=0.6)
    series = module_series(run, name)
    if not any(np.isfinite(values).any() for _, values in series.values()):
        text = missing(run, name)
        if series:
            text = 'NaN or infinite throughout'
        axis.text(
            *(0.5, 0.5, text),
            transform=axis.transAxes,
            ha='center',
            va='center',
            color='#555555',
        )
        return
    width = smoothing_width(run)
    for i, (module, style) in enumerate(styles.items()):
        if module not in series:
            continue
        steps, values = series[module]
        values = np.where(np.isfinite(values), values, np.nan)
        if name in NOISY:
            axis.plot(
                *(steps, values),
                color=style['color'],
                alpha=0.25,
                linewidth=0.5,
            )
            values = smooth(values, width)
        # a few markers, at different places for each line
        every = max(1, len(steps) // 6)
        first = i * every // max(1, len(styles))
        axis.plot(steps, values, markevery=(first, every), **style)


def axis_limits(
    runs: Sequence[Run], names: Sequence[str]
) -> Dict[str, Tuple[float, float]]:
    """Limits of the x axis ('x') and of each quantity's axis, for all runs."""
    found = {'x': (0.0, 1.02 * max(run.last_step for run in runs))}
    for name in names:
        quantity = QUANTITIES[name]
        values = np.concatenate(
            [np.ones(0)]
            + [v for run in runs for _, v in module_series(run, name).values()]
        )
        values = values[np.isfinite(values)]
        if quantity.log:
            values = values[values > 0]
        if quantity.reference is not None:
            values = np.append(values, quantity.reference)
        if not len(values):
            values = np.array([1.0, 10.0])
        low, high = float(values.min()), float(values.max())
        if quantity.log:
            margin = (high / low) ** 0.05 * 1.05
            found[name] = (low / margin, high * margin)
        else:
            margin = 0.06 * (high - low) or 0.1
            found[name] = (low - margin, high + margin)
        if name == 'variance':
            found[name] = (0.0, found[name][1])
    return found


def draw_curves(
    runs: Sequence[Run],
    curves: Sequence[Optional[Series]],
    label: str,
    width: int = 1,
) -> plt.Figure:
    """One line for each run with a curve, its mean over ``width`` values."""
    with plt.rc_context(TEXT):
        figure, axis = plt.subplots(
            figsize=(COLUMN, 2.2 + 0.15 * len(runs)), layout='constrained'
        )
        for i, (run, curve) in enumerate(zip(runs, curves)):
            if curve is None:
                continue
            steps, values = curve
            every = max(1, len(steps) // 6)
            values = smooth(np.asarray(values, float), width)
            axis.plot(
                *(steps, values),
                label=run.name,
                markevery=(i * every // len(runs), every),
                **line_style(i),
            )
        axis.set_xlim(0, 1.02 * max(run.last_step for run in runs))
        axis.set_xlabel('iteration')
        axis.set_ylabel(label)
        figure.legend(
            loc='outside lower center', handlelength=3, frameon=False
        )
    return figure


def save(figure: plt.Figure, out: Any, suffix: str) -> None:
    """Write a figure so that the same run gives the same file."""
    undated = dict(svg={'Date': None}, pdf={'CreationDate': None})
    with plt.rc_context({'svg.hashsalt': 'mmagvm'}):
        figure.savefig(
            out, format=suffix, dpi=300, metadata=undated.get(suffix)
        )
