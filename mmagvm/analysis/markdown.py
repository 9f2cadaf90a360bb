"""Tables in Markdown, and the pages that contain them."""

from pathlib import Path
from typing import Dict, Sequence

from mmagvm.markdown import filled


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns that also line up in a terminal."""
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
    """Bytes in a suitable unit."""
    for unit, scale in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if abs(count) >= scale:
            return f'{count / scale:.1f} {unit}'
    return f'{count:.0f} B'


def fill(path: Path, name: str, text: str) -> None:
    """Write ``text`` between a file's two comments named ``name``.

    A file without them, or a new file, gets them at its end.
    """
    page = path.read_text() if path.exists() else ''
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(filled(page, name, text))
