"""Trains one run of the study; writes what came of it as JSON."""

import argparse
import gc
import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.runner import Runner

from mmagvm.analysis.run_log import QUANTITIES, Series, load_run
from mmagvm.analysis.run_summary import measurements, update_time
from mmagvm.errors import command
from mmagvm.strict_json import to_json
from mmagvm.version import full_version
from study.plan import Run, fingerprint
from study.run_config import make_config

ROOT = Path(__file__).resolve().parents[2]
#: Tracked, and appended to while runs go on.
RESULTS = 'tools/study/results.jsonl'
#: Means that a series is reduced to, to keep the results small.
BINS = 32


def train(
    study: Mapping[str, Any], run: Run, work_dir: Path
) -> Dict[str, Any]:
    """Train and evaluate a run.

    Returns:
        What identifies the run; ``status``, 'ended' or 'diverged';
        ``metrics`` on tuning and test images, 0 where it diverged; and what
        its log says.
    """
    runner = Runner.from_cfg(make_config(study, run, work_dir))
    metric = study['models'][run.cell.model]['metric']
    status = 'ended'
    commit = code_version()  # of now: it may have changed when training ends
    started = time.perf_counter()
    try:
        runner.train()
        metrics = dict(
            tune=validated(runner, metric),
            test=float(runner.test().get(metric, 0.0)),
        )
    except Exception:
        if not diverged(runner):
            raise
        status, metrics = 'diverged', dict(tune=0.0, test=0.0)
    return dict(
        run.to_dict(),
        status=status,
        metrics=metrics,
        seconds=round(time.perf_counter() - started, 1),
        **summary(work_dir, runner.max_iters),
        clipped=clipped_share(runner),
        declaration=fingerprint(study, run.cell),
        commit=commit,
        torch=torch.__version__,
        device=str(next(runner.model.parameters()).device.type),
        date=time.strftime('%Y-%m-%d', time.gmtime()),
    )


def code_version() -> str:
    """mmagvm's version and commit; '-dirty' if more changed than results."""
    version = full_version()
    if not version.endswith('-dirty'):
        return version
    changed = subprocess.run(
        ['git', 'diff', '--quiet', 'HEAD', '--', '.', f':!{RESULTS}'], cwd=ROOT
    )
    return version if changed.returncode else version[: -len('-dirty')]


def validated(runner: Runner, metric: str) -> float:
    """The metric of the validation that ended the training."""
    history = runner.message_hub.log_scalars.get(f'val/{metric}')
    # mmdet gives none where nothing at all is detected
    return 0.0 if history is None else float(history.current())


def diverged(runner: Runner) -> bool:
    """Whether the loss or a weight is not finite."""
    losses = MessageHub.get_current_instance().log_scalars.get('train/loss')
    return (losses is not None and not math.isfinite(losses.current())) or any(
        not param.isfinite().all() for param in runner.model.parameters()
    )


def clipped_share(runner: Runner) -> Optional[float]:
    """Of updates, those with clipped gradients; None if none are clipped."""
    norms = runner.message_hub.log_scalars.get('train/grad_norm')
    if norms is None:
        return None
    values, _ = norms.data
    limit = runner.optim_wrapper.clip_grad_kwargs['max_norm']
    return round(float((values > limit).mean()), 4)


def summary(work_dir: Path, planned: int) -> Dict[str, Any]:
    """Series of a log, in BINS means each, and what AGVM counted and cost.

    Args:
        work_dir: Of the run.
        planned: Iterations of the training, were it to reach its end.
    """
    try:
        log = load_run(work_dir)
    except ValueError:  # it diverged before anything was logged
        return dict(loss=[], **{quantity: {} for quantity in QUANTITIES})
    series = {
        quantity: {
            module: binned(values, planned)
            for module, values in log.by_module(quantity).items()
        }
        for quantity in QUANTITIES
    }
    return dict(
        loss=binned(log.series['loss'], planned),
        **series,
        measurements=measurements(log),
        update_time=update_time(log),
    )


def binned(series: Series, planned: int) -> List[Any]:
    """Means over equal parts of a training; None where there are none.

    Args:
        series: By iteration, from 1.
        planned: Iterations of the training, were it to reach its end.
    """
    steps, values = series
    parts = np.minimum((steps - 1) * BINS // planned, BINS - 1)
    means = []
    for part in range(BINS):
        inside = values[(parts == part) & np.isfinite(values)]
        means.append(float(f'{inside.mean():.4g}') if len(inside) else None)
    return means


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('study', help='declaration of the study')
    parser.add_argument('run', help='the run, as JSON')
    parser.add_argument('work_dir', type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # mmdet makes many small objects; looking for cycles is a fifth of the time
    gc.set_threshold(50_000, 20, 100)
    study = Config.fromfile(args.study)
    run = Run.from_dict(json.loads(args.run))
    result = train(study, run, args.work_dir)
    (args.work_dir / 'result.json').write_text(to_json(result))


if __name__ == '__main__':
    main()
