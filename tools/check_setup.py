"""Checks this machine or cluster before a training, in a minute or two.

On one node it starts itself on a rank for each GPU or, without GPUs, on two
gloo ranks. tools/dist_check.sh and tools/slurm_check.sh start it on several
nodes. Prints a table; the exit status is 0 if nothing failed.
"""

import argparse
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import List

import torch
from mmengine.config import Config
from mmengine.device import get_device

from mmagvm.arguments import output_file
from mmagvm.checks.checklist import checklist
from mmagvm.checks.environment import versions
from mmagvm.checks.ranks import Ranks
from mmagvm.checks.result import FAILED, PASSED, Result
from mmagvm.checks.running import run_checks
from mmagvm.errors import UsageError, command
from mmagvm.launch.rendezvous import (
    free_port,
    launcher_store,
    timeout_seconds,
)
from mmagvm.launch.runner import join_ranks, leave_ranks, use_omp_threads


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=Path('work_dirs/check_setup'),
        help='folder for the checks that train, shared by all nodes (default: '
        'work_dirs/check_setup)',
    )
    parser.add_argument(
        '--out',
        type=output_file,
        help='JSON file for a bug report (default: check_setup.json in the '
        'work dir)',
    )
    parser.add_argument(
        '--timeout',
        type=float,
        default=120,
        help='seconds in which each check must end on all ranks (default: '
        '120)',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch'],
        default='none',
        help='job launcher; given by tools/dist_check.sh',
    )
    args = parser.parse_args()
    if args.timeout <= 0:
        raise UsageError(
            f'--timeout {args.timeout:g}: each check needs some seconds to '
            'end: write more than 0, such as 120'
        )
    return args


def start_ranks(count: int, how: str) -> int:
    """Run this command on ``count`` ranks of this machine.

    Returns:
        Its exit status.
    """
    print(f'Starts {count} {how}; for several nodes: tools/dist_check.sh.')
    port = os.environ.get('PORT') or str(free_port())
    dist_run = Path(__file__).resolve().parent / 'dist_run.py'
    return subprocess.run(
        [
            *(sys.executable, str(dist_run), '--nnodes=1'),
            *('--node_rank=0', '--master_addr=127.0.0.1'),
            *(f'--master_port={port}', f'--nproc_per_node={count}'),
            *(__file__, '--launcher=pytorch', *sys.argv[1:]),
        ],
        env={
            'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // count)),
            **os.environ,
            'MASTER_ADDR': '127.0.0.1',
            'PORT': port,
        },
    ).returncode


class Report:
    """Reports results, on rank 0."""

    def __init__(self, file: Path, speaks: bool, width: int) -> None:
        self.file, self.speaks, self.width = file, speaks, width

    def show(self, result: Result) -> None:
        """As a line of the table."""
        if self.speaks:
            print(result.line(self.width), flush=True)

    def end(self, results: List[Result]) -> None:
        """Print how many checks passed, and write the JSON file."""
        if not self.speaks:
            return
        failed = [result for result in results if result.status == FAILED]
        passed = [result for result in results if result.status == PASSED]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(
            json.dumps(
                dict(
                    passed=not failed,
                    versions=versions(),
                    results=[result.as_dict() for result in results],
                ),
                indent=2,
                allow_nan=False,
            )
            + '\n'
        )
        print(
            f'{len(passed)} passed, {len(failed)} failed, '
            f'{len(results) - len(passed) - len(failed)} not applicable; '
            f'attach {self.file} to a bug report',
            flush=True,
        )


@command
def main() -> None:
    args = parse_args()
    warnings.simplefilter('ignore')  # of the packages that it checks
    device = get_device()
    if args.launcher == 'none' and device == 'cuda':
        raise SystemExit(
            start_ranks(torch.cuda.device_count(), 'ranks, one for each GPU')
        )
    if args.launcher == 'none' and device == 'cpu':
        raise SystemExit(start_ranks(2, 'gloo ranks, as there is no GPU'))
    # longer than the checks wait, so that they report it
    patience = args.timeout + timeout_seconds()
    cfg = Config(
        dict(
            launcher=args.launcher,
            env_cfg=dict(dist_cfg=dict(timeout=patience)),
        )
    )
    use_omp_threads()
    join_ranks(cfg)
    ranks = Ranks.here(
        launcher_store(args.timeout), cfg.get('model_wrapper_cfg')
    )
    checks = checklist(args.work_dir)
    width = max(len(name) for name, _ in checks)
    report = Report(
        args.out or args.work_dir / 'check_setup.json', not ranks.rank, width
    )
    results = run_checks(checks, ranks, args.timeout, report.show, report.end)
    report.end(results)
    ranks.gather('done', True)  # rank 0 reports all before any rank ends
    leave_ranks()
    if any(result.status == FAILED for result in results):
        raise SystemExit(1)


if __name__ == '__main__':
    main()
