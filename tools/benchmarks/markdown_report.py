"""Statistics of timings, and the tables of a report."""

import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Dict, Sequence

import numpy as np
import torch

PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmagvm', 'numpy')


def summary(values: Sequence[float]) -> Dict[str, float]:
    """Median, quartiles and the 95 % interval of the median.

    The interval is between two of the values, by order statistics: it
    supposes nothing of the distribution.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    n = len(ordered)
    outside = 0  # values left out at either end
    below = 1.0  # of 2^n: so many ways has the median to be among those
    while 2 * below <= 0.05 * 2.0**n:
        outside += 1
        below += math.comb(n, outside)
    outside = max(outside - 1, 0)
    return dict(
        median=float(np.median(ordered)),
        q1=float(np.quantile(ordered, 0.25)),
        q3=float(np.quantile(ordered, 0.75)),
        low95=float(ordered[outside]),
        high95=float(ordered[n - 1 - outside]),
        n=n,
    )


def ratio_summary(
    numerators: Sequence[float], denominators: Sequence[float]
) -> Dict[str, float]:
    """:func:`summary` of the ratios within each repetition.

    What slows a whole repetition down, such as another program, cancels.
    """
    return summary(np.divide(numerators, denominators).tolist())


def machine() -> Dict[str, Any]:
    """What the figures depend on and cannot be chosen."""
    cpu = platform.processor()
    if Path('/proc/cpuinfo').exists():
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                cpu = line.split(':', 1)[1].strip()
                break
    pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return dict(
        cpu=cpu,
        cores=os.cpu_count(),
        memory_gib=round(pages / 2**30, 1),
        gpus=[
            torch.cuda.get_device_name(i)
            for i in range(torch.cuda.device_count())
        ],
        system=platform.platform(),
    )


def versions() -> Dict[str, str]:
    """Of everything that takes part, and the commit if there is one."""
    found = dict(python=platform.python_version())
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = '-'
    done = subprocess.run(
        ['git', 'describe', '--always', '--dirty'],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    found['commit'] = done.stdout.strip() or '-'
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(3, *map(len, column)) for column in zip(*lines)]
    lines.insert(1, ['-' * width for width in widths])
    return '\n'.join(
        '| '
        + ' | '.join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        )
        + ' |'
        for line in lines
    )


def quartiles(stats: Dict[str, float], digits: int, factor: float = 1) -> str:
    """``median (q1 to q3)``."""
    median, q1, q3 = (
        f'{stats[key] * factor:.{digits}f}' for key in ('median', 'q1', 'q3')
    )
    return f'{median} ({q1} to {q3})'


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, scale in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if abs(count) >= scale:
            return f'{count / scale:.1f} {unit}'
    return f'{count:.0f} B'


def fill(path: Path, name: str, text: str) -> None:
    """Write ``text`` between a file's two comments that carry ``name``.

    A file that has them not, or does not exist, gets them at its end.
    """
    begin, end = f'<!-- {name}: begin -->', f'<!-- {name}: end -->'
    old = path.read_text() if path.exists() else ''
    if begin not in old:
        old += f'{begin}\n{end}\n'
    before, rest = old.split(begin, 1)
    after = rest.split(end, 1)[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{before}{begin}\n{text.strip()}\n{end}{after}')
