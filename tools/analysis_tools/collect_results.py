"""Writes the results of runs as rows of a table, read from their logs."""

import argparse
import sys
from pathlib import Path

from mmagvm.analysis.results import markdown, result
from mmagvm.analysis.run_log import load_runs
from mmagvm.analysis.run_summary import main_metrics
from mmagvm.arguments import output_file
from mmagvm.errors import command
from mmagvm.strict_json import to_json


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', type=Path, nargs='+')
    parser.add_argument(
        '--json', type=output_file, help='also write the rows to this file'
    )
    args = parser.parse_args()
    runs = load_runs(args.work_dir)
    results = [result(run) for run in runs]
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = to_json(results, indent=1)
        args.json.write_text(text + '\n')
        print(args.json, file=sys.stderr)
    print(markdown(results, main_metrics(runs)))


if __name__ == '__main__':
    main()
