"""Draws AGVM's measurements and multipliers in one run or several.

Each run has a panel, on shared axes, with a line for each module. Figures show
the gradient variance phi (raw faint, smoothed strong), its ratio to the
anchor's, the multiplier lr_scale, the learning rate in force, and the noise
scale.
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from mmagvm.analysis.figures import (
    QUANTITIES,
    draw,
    remarks,
    save,
    smoothing_width,
)
from mmagvm.analysis.run_log import load_runs, require_agvm
from mmagvm.errors import command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        'work_dir', type=Path, nargs='+', help='of a run with AGVM'
    )
    parser.add_argument(
        '--out-dir',
        type=Path,
        help="folder for the pictures (default: the first run's work dir)",
    )
    parser.add_argument(
        '--formats',
        nargs='+',
        default=['png', 'svg', 'pdf'],
        choices=['png', 'svg', 'pdf'],
        help='file formats of every picture (default: all)',
    )
    return parser.parse_args()


@command
def main() -> None:
    args = parse_args()
    runs = load_runs(args.work_dir)
    for run in runs:
        require_agvm(run)
    for line in remarks(runs, list(QUANTITIES)):
        print(line, file=sys.stderr)
    pictures = {name: [name] for name in QUANTITIES}
    if len(runs) == 1:
        pictures['overview'] = ['variance', 'lr_scale']
    out_dir = args.out_dir or args.work_dir[0]
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, quantities in pictures.items():
        figure = draw(runs, quantities)
        for suffix in args.formats:
            out = out_dir / f'{name}.{suffix}'
            save(figure, out, suffix)
        plt.close(figure)
        print(f'{out_dir / name}.{"|".join(args.formats)}')
    widths = sorted({smoothing_width(run) for run in runs})
    print(
        'strong lines of variance and ratio: running mean of '
        f'{" or ".join(map(str, widths))} measurements'
    )


if __name__ == '__main__':
    main()
