"""Writes one page that compares runs; it opens without a network.

The page has settings side by side, final metrics, curves, AGVM's measurements
of every module, and their cost. All is read from the logs of the runs.
"""

import argparse
import sys
from pathlib import Path

from mmagvm.analysis.report import page
from mmagvm.analysis.run_log import load_runs
from mmagvm.arguments import output_file
from mmagvm.errors import command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('work_dir', type=Path, nargs='+')
    parser.add_argument(
        '--out',
        type=output_file,
        default=Path('report.html'),
        help='page to write (default: report.html)',
    )
    parser.add_argument('--title', help="default: the runs' names")
    args = parser.parse_args()
    runs = load_runs(args.work_dir)
    text = page(runs, args.title, lambda line: print(line, file=sys.stderr))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text)
    print(args.out)


if __name__ == '__main__':
    main()
