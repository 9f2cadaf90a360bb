"""The summary of a run: its origin, its end and its cost."""

import re
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from mmagvm.analysis.run_log import Run
from mmagvm.analysis.statistics import summary

#: Least number of values with the median between the smallest and the largest
#: in 95 % of all cases.
FEWEST = 6


def config_name(run: Run) -> str:
    """The name of the config file, as MMEngine dumped it, or '-'."""
    folders = (run.work_dir, run.work_dir.parent)
    for folder in folders:
        dumped = sorted(folder.glob('*.py'), key=lambda p: p.stat().st_mtime)
        if dumped:
            return dumped[-1].stem
    return '-'


def commit(run: Run) -> Optional[str]:
    """Version and commit of mmagvm; several if a run resumed with another."""
    found: Dict[str, None] = {}
    for log in run.logs:
        recorded = _search(
            log.parent / 'vis_data' / 'config.py',
            r"^mmagvm_version = '([^']+)'",
        ) or _search(log, r'AGVM: mmagvm (\S+)')
        if recorded:
            found.setdefault(recorded)
    return ', then '.join(found) or None


def seed(run: Run) -> Optional[int]:
    """The seed of a run, set or drawn."""
    for log in reversed(run.logs):
        found = _search(log, r'^\s+seed: (\d+)$')
        if found:
            return int(found)
    value = (run.config or {}).get('randomness', {}).get('seed')
    return None if value is None else int(value)


def batch_size(run: Run) -> Optional[int]:
    """Images of an update, over all ranks; None if it is not logged."""
    loader = (run.config or {}).get('train_dataloader') or {}
    ranks = [_search(log, r'^\s+GPU number: (\d+)$') for log in run.logs[-1:]]
    images = loader.get('batch_size')
    if not isinstance(images, int) or not ranks or not ranks[0]:
        return None  # batches of some loaders have no fixed size
    accumulated = run.setting('accumulative_counts', 1)
    return images * int(ranks[0]) * int(accumulated)


def progress(run: Run) -> str:
    """How far a run came, out of the length in its config."""
    train_cfg = (run.config or {}).get('train_cfg') or {}
    if 'max_iters' in train_cfg:
        return f'iteration {run.last_step} of {train_cfg["max_iters"]}'
    if 'max_epochs' in train_cfg and 'epoch' in run.series:
        epoch = int(run.series['epoch'][1][-1])
        return (
            f'iteration {run.last_step}, in epoch {epoch} of '
            f'{train_cfg["max_epochs"]}'
        )
    return f'iteration {run.last_step}'


def metrics(run: Run) -> Dict[str, float]:
    """All metrics of the last validation."""
    if not run.metrics:
        return {}
    last = max(steps[-1] for steps, _ in run.metrics.values())
    return {
        tag: float(values[-1])
        for tag, (steps, values) in run.metrics.items()
        if steps[-1] == last and tag not in ('time', 'data_time')
    }


def main_metrics(runs: List[Run]) -> List[str]:
    """The metrics to report: mAP and mIoU, or the first one."""
    tags = list(dict.fromkeys(tag for run in runs for tag in metrics(run)))
    return [tag for tag in tags if re.search('(mAP|mIoU)$', tag)] or tags[:1]


def divergence(run: Run) -> Optional[str]:
    """How a run diverged, in words; None if it did not.

    A run diverged if its loss was NaN or infinite, and stayed so until the
    end or the last validation found nothing.
    """
    steps, loss = run.series.get('loss', (np.zeros(0), np.zeros(0)))
    bad = ~np.isfinite(loss)
    if not bad.any():
        return None
    first = int(steps[bad][0])
    found = [metrics(run).get(tag, 0) for tag in main_metrics([run])]
    validated = max((s[-1] for s, _ in run.metrics.values()), default=-1)
    if bad[-1]:
        return f'diverged: the loss is NaN or infinite from iteration {first}'
    if validated >= first and not any(value > 0 for value in found):
        return (
            f'diverged: the loss was NaN or infinite at iteration {first}, '
            'and no validation after it found anything'
        )
    return None


def measurements(run: Run) -> Optional[Dict[str, Any]]:
    """Numbers of measurements and of skipped ones; None without AGVM."""
    if 'agvm/skipped' not in run.series:
        return None
    steps, skipped = run.series['agvm/skipped']
    _, measured = run.series.get('agvm/measured', (steps, [np.nan]))
    return dict(
        measured=float(measured[-1]),
        skipped=int(skipped[-1]),
        skipped_by=[int(s) for s in steps[np.diff(skipped, prepend=0) > 0]],
    )


def iteration_time(run: Run) -> Optional[float]:
    """Median seconds of an iteration."""
    if 'time' not in run.series:
        return None
    return float(np.nanmedian(run.series['time'][1]))


def update_time(run: Run) -> Optional[Dict[str, Any]]:
    """The cost of measuring, from logged updates of both kinds.

    A measured update is compared with the other one of the same logged line,
    so that influences on both cancel.

    Returns:
        ``measured`` and ``unmeasured``, median seconds; ``count``, the lines
        compared; ``interval``; ``share``, the part of the time of
        ``interval`` updates that one measurement adds, by the median
        difference; and ``low`` and ``high``, the share by the ends of the
        median's 95 % interval. None if the run logged fewer than FEWEST of
        both kinds.
    """
    logged = {
        kind: dict(zip(*run.series.get(f'agvm_update_time/{kind}', ((), ()))))
        for kind in ('measured', 'unmeasured')
    }
    steps = [
        step for step in logged['measured'] if step in logged['unmeasured']
    ]
    if not steps:
        return None
    slow, fast = (
        np.array([seconds[step] for step in steps])
        for seconds in logged.values()
    )
    new = (np.diff(slow, prepend=0) != 0) & (np.diff(fast, prepend=0) != 0)
    slow, fast = slow[new], fast[new]
    if len(slow) < FEWEST:
        return None
    interval = run.setting('interval', 10)
    extra = summary(slow - fast)
    shares = {
        name: extra[end] / (interval * np.median(fast) + extra[end])
        for name, end in (
            ('low', 'low95'),
            ('share', 'median'),
            ('high', 'high95'),
        )
    }
    return dict(
        measured=float(np.median(slow)),
        unmeasured=float(np.median(fast)),
        count=len(slow),
        interval=interval,
        **shares,
    )


def _search(file: Path, pattern: str) -> Optional[str]:
    """The pattern's group in the first line that matches, if there is one."""
    if file.is_file():
        with file.open(errors='replace') as lines:
            for line in lines:
                match = re.search(pattern, line)
                if match:
                    return match[1]
    return None
