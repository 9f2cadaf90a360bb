"""Draws what AGVM measured and did in a run.

Two panels over the iterations: the gradient variance phi of every module, raw
(faint) and smoothed (strong), and the multiplier of its learning rate.
"""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List

import matplotlib.pyplot as plt
import numpy as np

#: Okabe and Ito's colours, which the colour-blind tell apart, and dashes for
#: print without colour.
COLOURS = ['#000000', '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00']
DASHES = ['-', '--', '-.', ':', (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))]


def newest_scalars(work_dir: Path) -> Path:
    """The scalars that the latest run with AGVM in ``work_dir`` logged."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    for file in reversed(files):
        if '"agvm/' in file.read_text():
            return file
    raise SystemExit(
        f'{work_dir}: none of its {len(files)} runs logged agvm/ series; is '
        'AGVMHook in custom_hooks?'
    )


def read_measurements(scalars: Path) -> List[Dict[str, Any]]:
    """The logged lines that a measurement came with, each once.

    Before the first measurement AGVM logs 1 for everything, and between two
    it repeats the last.
    """
    lines: List[Dict[str, Any]] = []
    for text in scalars.read_text().splitlines():
        line = json.loads(text)
        measured = line.get('agvm/measured', 0)
        if measured > (lines[-1]['agvm/measured'] if lines else 0):
            lines.append(line)
    if not lines:
        raise SystemExit(f'{scalars}: no measurement was logged')
    return lines


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred running mean, over fewer values at both ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, 'same') / np.convolve(
        np.ones(len(values)), kernel, 'same'
    )


def draw(lines: List[Dict[str, Any]], title: str) -> plt.Figure:
    """The figure of one run's measurements."""
    modules = [
        key[len('agvm/') : -len('/variance')]
        for key in lines[0]
        if key.endswith('/variance')
    ]
    steps = np.array([line['step'] for line in lines])
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 7), sharex=True, layout='constrained'
    )
    width = min(2 * (len(lines) // 16) + 1, len(lines))
    for i, module in enumerate(modules):
        style = dict(
            color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i % len(DASHES)]
        )
        phi = np.array([line[f'agvm/{module}/variance'] for line in lines])
        scale = [line[f'agvm/{module}/lr_scale'] for line in lines]
        top.plot(steps, phi, color=style['color'], alpha=0.2, linewidth=0.8)
        top.plot(steps, smooth(phi, width), label=module, **style)
        bottom.plot(steps, scale, label=module, **style)

    figure.suptitle(f'AGVM in {title}')
    top.set_title(
        'Gradient variance: how much the two halves of a batch disagree '
        '(0: not at all, 1: nothing in common)',
        fontsize='medium',
    )
    top.set_ylabel(r'$\phi = 1 - \cos(G_1, G_2)$')
    top.set_ylim(bottom=0)
    top.axhline(1, color='grey', linewidth=0.6)
    bottom.set_title(
        "AGVM's answer: what each module's learning rate is multiplied by",
        fontsize='medium',
    )
    bottom.set_ylabel(r'lr_scale $\mu$')
    bottom.axhline(1, color='grey', linewidth=0.6)
    bottom.set_xlabel('iteration')
    figure.legend(
        *top.get_legend_handles_labels(),
        loc='outside lower center',
        title=f'module (thick: mean of {width} measurements)',
        ncols=min(len(modules), 6),
        fontsize='small',
        title_fontsize='small',
    )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('work_dir', type=Path, help='of a run with AGVM')
    parser.add_argument(
        '--out',
        type=Path,
        help='picture to write (default: variance.png in the work dir)',
    )
    args = parser.parse_args()
    if not args.work_dir.is_dir():
        raise SystemExit(f'{args.work_dir}: no such work dir')
    scalars = newest_scalars(args.work_dir)
    configs = sorted(
        args.work_dir.glob('*.py'), key=lambda path: path.stat().st_mtime
    )
    name = configs[-1].stem if configs else args.work_dir.name
    out = args.out or args.work_dir / 'variance.png'
    draw(read_measurements(scalars), name).savefig(out, dpi=130)
    print(f'{out}, drawn from {scalars}')


if __name__ == '__main__':
    main()
