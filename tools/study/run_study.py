"""Does the runs of a study that have no result yet.

Appends the result of each to a file of JSON lines, so that it can be stopped
and started again at any point; a run that was cut off is begun anew.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any, Dict, List, Mapping, Set

from mmengine.config import Config
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mmagvm.strict_json import to_json
from study import prepare
from study.plan import Result, Run, by_run, plan

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: Where a run finds the code of this checkout.
PATHS = [str(ROOT), str(ROOT / 'tools')]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--study', type=Path, default=HERE / 'declaration.py')
    parser.add_argument('--results', type=Path, default=HERE / 'results.jsonl')
    parser.add_argument(
        '--work-dir', type=Path, default=ROOT / 'work_dirs/study'
    )
    parser.add_argument(
        '--jobs', type=int, default=os.cpu_count(), help='runs at a time'
    )
    return parser.parse_args()


def read_results(file: Path) -> List[Result]:
    """All results that are there; a line cut short by a crash is left out."""
    results = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            results.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return results


def append(file: Path, result: Result) -> None:
    """One line, on disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open('a+b') as stream:
        if stream.tell():  # a crash may have left half a line
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b'\n':
                stream.write(b'\n')
        stream.write(to_json(result).encode() + b'\n')
        stream.flush()
        os.fsync(stream.fileno())


def train(study_file: Path, run: Run, work_dir: Path) -> Result:
    """Train a run in a process of its own, on one core."""
    folder = work_dir / run.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / 'train.log'
    with log.open('w') as stream:
        done = subprocess.run(
            [
                *(sys.executable, str(HERE / 'train_run.py')),
                *(str(study_file), json.dumps(run.to_dict()), str(folder)),
            ],
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                'OMP_NUM_THREADS': '1',
                'PYTHONPATH': os.pathsep.join(PATHS),
            },
        )
    result_file = folder / 'result.json'
    if done.returncode == 0 and result_file.is_file():
        result: Result = json.loads(result_file.read_text())
        return result
    last = log.read_text().strip().splitlines()[-1:] or ['no output']
    return dict(run.to_dict(), status='failed', error=last[0], log=str(log))


def report(console: Console, run: Run, result: Result) -> None:
    """A line on how a run ended."""
    if result['status'] == 'failed':
        console.print(f'{run.name} failed: {result["error"]}; {result["log"]}')
        return
    metrics = ', '.join(f'{k} {v:.3f}' for k, v in result['metrics'].items())
    console.print(
        f'{run.name} {result["status"]}: {metrics}; {result["seconds"]:.0f} s'
    )


def run_all(
    study: Mapping[str, Any], args: argparse.Namespace, console: Console
) -> int:
    """Do all runs; how many failed."""
    done = by_run(study, read_results(args.results))
    failed: Set[Run] = set()
    running: Dict[Future[Result], Run] = {}
    with (
        Progress(
            TextColumn('runs'),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn('left'),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            speed_estimate_period=6 * 3600,
        ) as progress,
        ThreadPoolExecutor(args.jobs) as pool,
    ):
        bar = progress.add_task('runs', total=None)
        while True:
            # anew each time: results decide on rates
            runs = list(plan(study, done))
            ended = sum(run in done or run in failed for run in runs)
            progress.update(bar, total=len(runs), completed=ended)
            for run in runs:
                if len(running) == args.jobs:
                    break
                if (
                    run.lr is not None
                    and run not in done
                    and run not in failed
                    and run not in running.values()
                ):
                    future = pool.submit(train, args.study, run, args.work_dir)
                    running[future] = run
            if not running:
                return len(failed)
            for future in wait_for(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                result = future.result()
                report(progress.console, run, result)
                append(args.results, result)
                if result['status'] == 'failed':
                    failed.add(run)
                else:
                    done[run] = result


def main() -> None:
    args = parse_args()
    if args.jobs < 1:
        raise SystemExit(f'--jobs {args.jobs}: write 1 or more')
    if not args.study.is_file():
        raise SystemExit(f'--study {args.study}: no such file')
    for name in ('study', 'results', 'work_dir'):
        setattr(args, name, getattr(args, name).resolve())
    os.chdir(ROOT)  # where the data set's folder is declared from
    console = Console()
    study = Config.fromfile(args.study)
    console.print('Drawing data, unless they are there')
    prepare.make_data(study)
    right = prepare.pretrain(study)
    if right == right:
        console.print(f'Pretrained backbone: {right:.1%} of scans right')
    failures = run_all(study, args, console)
    if failures:
        raise SystemExit(f'{failures} runs failed; start again to repeat them')


if __name__ == '__main__':
    main()
