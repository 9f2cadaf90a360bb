"""Advises on the batch size, from what AGVM measured in a run.

Reports for each module the batch size at which its gradient stops gaining
(the gradient noise scale of McCandlish et al., "An Empirical Model of
Large-Batch Training", 2018). Also reports which batch size the whole model
tolerates, and the multipliers that AGVM would apply at other batch sizes.
All values have 95 % intervals, unless the run is too short for one.
"""

import argparse
import sys
from pathlib import Path

from mmagvm.analysis.run_log import load_run, require_agvm
from mmagvm.errors import UsageError, command
from mmagvm.planning.batch_advice import advise, read_batch_size, read_measured


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('work_dir', type=Path, help='of a run with AGVM')
    parser.add_argument(
        '--begin',
        type=int,
        help='first iteration to use (default: the second half of the '
        'measurements)',
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        help='images per update of the run (default: from its log)',
    )
    parser.add_argument(
        '--at',
        type=int,
        nargs='+',
        help='batch sizes to predict multipliers for (default: 2 to 64 times '
        "the run's)",
    )
    return parser.parse_args()


@command
def main() -> None:
    args = parse_args()
    for name, values in (
        ('--batch-size', [args.batch_size]),
        ('--at', args.at or []),
    ):
        for value in values:
            if value is not None and value < 1:
                raise UsageError(f'{name} {value}: write 1 or more images')
    try:
        run = load_run(args.work_dir)
    except ValueError as error:
        raise UsageError(str(error)) from None
    require_agvm(run)
    for note in run.notes:
        print(f'{run.name}: {note}', file=sys.stderr)
    batch = args.batch_size or read_batch_size(run)
    measured = read_measured(run, batch, args.begin)
    if run.anchor not in measured.modules:
        raise UsageError(
            f'{run.work_dir}: the anchor {run.anchor!r} was never measured: '
            'choose another with optim_wrapper.anchor'
        )
    low, high = run.setting('ratio_range', (0.1, 10.0))
    print(
        advise(
            measured,
            run.anchor,
            float(run.setting('eps', 1e-6)),
            (low, high),
            args.at or [batch * factor for factor in (2, 4, 8, 16, 32, 64)],
            bool(run.setting('modulate', True)),
            bool(run.setting('bound_by_grad_norm', False)),
        )
    )


if __name__ == '__main__':
    main()
