"""Writes one page that compares runs; it opens without a network.

The page has settings side by side, final metrics, curves, AGVM's measurements
of every module, and their cost. All is read from the logs of the runs.
"""

import io
import re
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
)

import matplotlib.pyplot as plt
from jinja2 import Environment, FileSystemLoader

from mmagvm.analysis.figures import (
    axis_limits,
    draw,
    draw_curves,
    module_styles,
    remarks,
    save,
    smoothing_width,
)
from mmagvm.analysis.run_log import Run
from mmagvm.analysis.run_summary import (
    batch_size,
    commit,
    config_name,
    divergence,
    iteration_time,
    main_metrics,
    measurements,
    metrics,
    progress,
    seed,
    update_time,
)
from mmagvm.errors import UsageError

#: A row of a table: its name, and a cell for each run.
Row = Tuple[str, List[str]]

MODULE_SECTIONS = {
    'variance': (
        'Gradient variance',
        'How far the gradients of the two halves of a batch differ in each '
        'module: 0 for equal directions, 1 for orthogonal ones. Faint lines '
        'are raw values, strong lines the running mean of {width} '
        'measurements.',
    ),
    'lr_scale': (
        'Learning-rate multiplier',
        'The factor of the learning rate of each module.',
    ),
    'noise_scale': (
        'Noise scale',
        "The batch size at which the noise of a module's gradient is as "
        'large as its signal. There are gaps where no signal showed.',
    ),
}


def flatten(value: Any, prefix: str = '') -> Iterator[Tuple[str, str]]:
    """Settings by their dotted names."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from flatten(item, f'{prefix}.{key}' if prefix else str(key))
    elif isinstance(value, (list, tuple)) and any(
        isinstance(item, dict) for item in value
    ):
        for i, item in enumerate(value):
            yield from flatten(item, f'{prefix}.{i}')
    else:
        yield prefix, repr(value)


def settings(runs: Sequence[Run]) -> Tuple[List[Row], List[Row]]:
    """The settings that differ between runs, and all settings."""
    columns = [
        dict(flatten(run.config.to_dict() if run.config else {}))
        for run in runs
    ]
    keys = sorted({key for column in columns for key in column})
    rows = [
        (key, [column.get(key, '-') for column in columns]) for key in keys
    ]
    different = [
        (key, cells)
        for key, cells in rows
        if len(set(cells)) > 1 and key != 'work_dir'
    ]
    return different, rows


def facts(runs: List[Run]) -> List[Row]:
    """The origin and the end of each run."""
    rows = [
        ('config', [config_name(run) for run in runs]),
        ('mmagvm', [commit(run) or 'not recorded' for run in runs]),
        ('seed', [_cell(seed(run)) for run in runs]),
        ('batch size', [_cell(batch_size(run)) for run in runs]),
        ('trained', [progress(run) for run in runs]),
        ('result', [divergence(run) or 'did not diverge' for run in runs]),
    ]
    ends = [metrics(run) for run in runs]
    main = main_metrics(runs)
    tags = list(dict.fromkeys([*main, *(tag for end in ends for tag in end)]))
    rows += [(tag, [_cell(end.get(tag)) for end in ends]) for tag in tags]
    if any(run.notes for run in runs):
        rows.append(('notes', ['; '.join(run.notes) or '-' for run in runs]))
    return rows


def costs(runs: Sequence[Run]) -> List[Row]:
    """The numbers of measurements and of skipped ones, and their time."""
    rows: Dict[str, List[str]] = {}
    for run in runs:
        counts, times = measurements(run), update_time(run)
        skipped = '-'
        if counts:
            skipped = str(counts['skipped'])
            if counts['skipped_by']:
                steps = ', '.join(map(str, counts['skipped_by'][:5]))
                more = ', ...' if len(counts['skipped_by']) > 5 else ''
                skipped += f' (logged at iteration {steps}{more})'
        share = '-' if not run.modules else 'too few logged'
        if times:
            share = (
                '{share:.1%}, 95 % interval {low:.1%} to {high:.1%}, with one '
                'in {interval} measured ({count} compared)'
            ).format(**times)
            if times['low'] <= 0 <= times['high']:
                share += ': within noise'
        cells = {
            'measurements': f'{counts["measured"]:.0f}' if counts else '-',
            'skipped (NaN or infinite)': skipped,
            'iteration': _seconds(iteration_time(run)),
            'measured update': _seconds(times and times['measured']),
            'other update': _seconds(times and times['unmeasured']),
            "AGVM's share": share,
        }
        for name, cell in cells.items():
            rows.setdefault(name, []).append(cell)
    return list(rows.items())


def _seconds(value: Any) -> str:
    return '-' if value is None else f'{value:.4g} s'


def _cell(value: Any) -> str:
    if value is None or value != value:
        return '-'
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def sections(runs: List[Run]) -> Iterator[Dict[str, Any]]:
    """Titles, texts and pictures, in their order."""
    tags = ['loss', *main_metrics(runs)]
    curves = []
    for tag in tags:
        found = [{**run.metrics, **run.series}.get(tag) for run in runs]
        if any(found):
            width = 5 if tag == 'loss' else 1
            curves.append(draw_curves(runs, found, tag, width))
    yield dict(
        title='Curves',
        text='The loss is the running mean of 5 logged values. Metrics are '
        'drawn at the last logged iteration before their validation.',
        figures=curves,
    )
    agvm = [run for run in runs if run.modules]
    names = list(MODULE_SECTIONS)
    styles, limits = module_styles(agvm), axis_limits(agvm, names)
    widths = sorted({smoothing_width(run) for run in agvm})
    for name, (title, text) in MODULE_SECTIONS.items():
        yield dict(
            title=title,
            text=text.format(width=' or '.join(map(str, widths))),
            figures=[draw([run], [name], styles, limits) for run in agvm],
        )


def svg(figure: plt.Figure, prefix: str) -> str:
    """A figure to embed in a page, with text as text.

    Its ids start with ``prefix``, as they must differ in the whole page.
    """
    out = io.StringIO()
    with plt.rc_context({'svg.fonttype': 'none'}):
        save(figure, out, 'svg')
    plt.close(figure)
    text = out.getvalue()
    text = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{prefix}', text)
    return text[text.index('<svg') :]


def page(
    runs: List[Run], title: Optional[str], report: Callable[[str], None]
) -> str:
    """The page, in HTML.

    Args:
        runs: The runs to compare.
        title: Defaults to the runs' names.
        report: Called with a line for each section that has been drawn.

    Raises:
        UsageError: None of them logged AGVM's measurements.
    """
    if not any(run.modules for run in runs):
        raise UsageError(
            f'{" ".join(str(run.work_dir) for run in runs)}: no agvm series '
            'was logged. Train with AGVMOptimWrapper and AGVMHook'
        )
    different, rows = settings(runs)
    drawn: List[Dict[str, Any]] = []
    for section in sections(runs):
        section['pictures'] = [
            svg(figure, f'{len(drawn)}-{i}-')
            for i, figure in enumerate(section['figures'])
        ]
        drawn.append(section)
        report(f'drew {section["title"]}')
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True
    ).get_template('report.html')
    return template.render(
        title=title or ' / '.join(run.name for run in runs),
        names=[run.name for run in runs],
        facts=facts(runs),
        remarks=remarks(runs, list(MODULE_SECTIONS)),
        different=different,
        settings=rows,
        sections=drawn,
        costs=costs(runs),
    )
