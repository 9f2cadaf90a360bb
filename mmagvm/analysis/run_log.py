"""Reads the logs of a run from its work dir, for every analysis tool.

MMEngine makes a folder, named by the time, for every start of a run. A run
that was interrupted and resumed has several; here they are joined.
"""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
from mmengine.config import Config

from mmagvm.core.modules import BACKBONE, find_anchor
from mmagvm.errors import UsageError

#: Steps, and one value for each.
Series = Tuple[np.ndarray, np.ndarray]

#: What AGVMHook logs for each module, as ``agvm_<quantity>/<module>``.
QUANTITIES = ('variance', 'lr_scale', 'noise_scale')


@dataclass
class Run:
    """One run, put together from all its starts.

    Attributes:
        work_dir: Where it was read from.
        name: The work dir's, for titles and legends.
        config: Of the last start; None if there is none.
        series: Training scalars by tag: steps in iterations, and values.
        metrics: Validation scalars by tag, at their iterations.
        modules: In the order of the model; empty without AGVM.
        anchor: The module that the others follow; None without AGVM.
        logs: Text logs of its starts, oldest first.
        notes: For readers of the figures, such as that the run was resumed.
    """

    work_dir: Path
    name: str
    config: Optional[Config] = None
    series: Dict[str, Series] = field(default_factory=dict)
    metrics: Dict[str, Series] = field(default_factory=dict)
    modules: List[str] = field(default_factory=list)
    anchor: Optional[str] = None
    logs: List[Path] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last iteration that logged anything."""
        return int(max(steps[-1] for steps, _ in self.series.values()))

    def setting(self, name: str, default: Any) -> Any:
        """A setting of ``optim_wrapper``, or its default."""
        wrapper = (self.config or {}).get('optim_wrapper') or {}
        return wrapper.get(name, default)

    def by_module(self, quantity: str) -> Dict[str, Series]:
        """A quantity of every module that has it, where it was measured.

        Before its first measurement AGVM logs 1 for everything. After a
        measurement it logs the same values until the next one, so the first
        line of each measurement counts. NaN and infinity are kept. If a line
        has noise scales of some modules only, the others are infinite.
        """
        found = {
            module: self.series[f'agvm_{quantity}/{module}']
            for module in self.modules
            if f'agvm_{quantity}/{module}' in self.series
        }
        if quantity == 'noise_scale' and found:
            lines = np.unique(np.concatenate([at for at, _ in found.values()]))
            found = {m: _filled(s, lines) for m, s in found.items()}
        measured = self._measured_steps()
        return {
            module: (steps[new], values[new])
            for module, (steps, values) in found.items()
            for new in [np.isin(steps, measured)]
        }

    def _measured_steps(self) -> np.ndarray:
        """Logged steps with a measurement since the one before."""
        if 'agvm/measured' not in self.series:  # then take all
            return np.unique(
                np.concatenate([steps for steps, _ in self.series.values()])
            )
        steps, counts = self.series['agvm/measured']
        # counts start at 0 again after a restart without AGVM's state
        new = (np.diff(counts, prepend=0) != 0) & (counts > 0)
        measured: np.ndarray = steps[new]
        return measured


def _filled(series: Series, lines: np.ndarray) -> Series:
    """A series with infinity at the lines that it lacks."""
    known = dict(zip(*series))
    return lines, np.array([known.get(step, np.inf) for step in lines])


def load_run(work_dir: Path) -> Run:
    """Read a run from its work dir, or from one of the folders in it.

    Pieces overlap if training went back to a checkpoint or started over. Then
    the later piece counts from its first logged iteration.

    Raises:
        ValueError: There is no such folder, or no training was logged in it.
    """
    work_dir = Path(work_dir)
    if not work_dir.is_dir():
        raise ValueError(f'{work_dir}: no such work dir')
    starts = [work_dir, *sorted(p for p in work_dir.iterdir() if p.is_dir())]
    run = Run(work_dir, work_dir.resolve().name)
    pieces = []
    for start in starts:
        file = start / 'vis_data' / 'scalars.json'
        if file.is_file():
            train, val = _read_lines(file, run.notes)
            if train:
                pieces.append((start, train, val))
    if not pieces:
        raise ValueError(
            f'{work_dir}: no training was logged here, in any '
            'TIME/vis_data/scalars.json'
        )
    train_lines: List[Dict[str, Any]] = []
    val_lines: List[Dict[str, Any]] = []
    kept: List[Tuple[Path, int]] = []
    for start, train, val in pieces:
        first = 0 if _starts_over(start) else train[0]['step']
        train_lines = [line for line in train_lines if line['step'] < first]
        val_lines = [line for line in val_lines if line['step'] < first]
        if not train_lines:
            kept = []
        # before the first line of training, epochs may still be counted
        before = train_lines[-1]['step'] if train_lines else 0
        kept.append((start, train[0]['step']))
        train_lines += train
        val_lines += [dict(v, step=max(v['step'], before)) for v in val]
    if len(kept) > 1:
        joints = ', '.join(str(first) for _, first in kept[1:])
        run.notes.append(f'resumed; its pieces join at iteration {joints}')
    dropped = len(pieces) - len(kept)
    if dropped:
        run.notes.append(
            f'{dropped} earlier start(s) left out, as training started over'
        )
    run.series, run.metrics = _by_tag(train_lines), _by_tag(val_lines)
    run.logs = [
        log for start, _ in kept for log in sorted(start.glob('*.log'))
    ]
    run.config = _read_config(pieces[-1][0], work_dir, run.notes)
    run.modules = [
        tag.split('/', 1)[1]
        for tag in run.series
        if tag.startswith('agvm_variance/')
    ]
    if run.modules:
        anchor = run.setting('anchor', BACKBONE)
        try:
            run.anchor = find_anchor(run.modules, anchor)
        except ValueError:
            run.notes.append(f'the anchor {anchor} was not logged')
    return run


def load_runs(work_dirs: Sequence[Path]) -> List[Run]:
    """Read runs for a command line, with names that differ.

    What ``work_dirs/*`` finds besides runs is left out, with a line.

    Raises:
        UsageError: There is no such path, or none of them has a run.
    """
    runs = []
    for i, work_dir in enumerate(work_dirs):
        if len(work_dirs) > 1:
            print(f'[{i + 1}/{len(work_dirs)}] {work_dir}', file=sys.stderr)
        try:
            runs.append(load_run(work_dir))
        except ValueError as error:
            if len(work_dirs) == 1 or not work_dir.exists():
                raise UsageError(str(error)) from None
            print(f'left out: {error}', file=sys.stderr)
    if not runs:
        raise UsageError('no training was logged in any of these folders')
    parts = [run.work_dir.resolve().parts for run in runs]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(set(parts)):
        depth += 1
    for run, part in zip(runs, parts):
        run.name = '/'.join(part[-depth:])
        for note in run.notes:
            print(f'{run.name}: {note}', file=sys.stderr)
    return runs


def require_agvm(run: Run) -> None:
    """End the command if a run has no series of AGVM.

    Raises:
        UsageError: It has none; the message names the reason.
    """
    if run.modules:
        return
    kind = run.setting('type', 'OptimWrapper')
    if run.config is not None and not str(kind).startswith('AGVM'):
        why = f'its config trains with {kind}, without AGVM'
    else:
        why = 'check that AGVMHook is in its custom_hooks'
    raise UsageError(f'{run.work_dir}: no agvm series was logged: {why}')


def _read_lines(
    file: Path, notes: List[str]
) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """Lines of training and of validation, with ``step`` in iterations."""
    train: List[Dict[str, Any]] = []
    val: List[Dict[str, Any]] = []
    for number, text in enumerate(file.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            step = line.pop('step')
        except (ValueError, KeyError, AttributeError):
            notes.append(f'line {number} of {file} is damaged and left out')
            continue
        if 'iter' in line:
            train.append({**line, 'step': step})
        else:
            # MMEngine counts validation in epochs by default
            before = train[-1]['step'] if train else 0
            val.append({**line, 'step': max(step, before)})
    return train, val


def _starts_over(start: Path) -> bool:
    """Whether a start says that it resumes nothing."""
    file = start / 'vis_data' / 'config.py'
    text = file.read_text(errors='replace') if file.is_file() else ''
    return bool(re.search(r'^resume = False$', text, re.MULTILINE))


def _by_tag(lines: List[Dict[str, Any]]) -> Dict[str, Series]:
    """The series of each tag, with steps at the lines that have it."""
    columns: Dict[str, Tuple[List[int], List[float]]] = {}
    for line in lines:
        for tag, value in line.items():
            if tag in ('step', 'iter') or not isinstance(value, (int, float)):
                continue
            # LogProcessor(log_with_hierarchy=True) writes train/loss
            tag = re.sub('^(train|val)/', '', tag)
            steps, values = columns.setdefault(tag, ([], []))
            steps.append(line['step'])
            values.append(value)
    return {
        tag: (np.array(steps), np.array(values, dtype=float))
        for tag, (steps, values) in columns.items()
    }


def _read_config(
    start: Path, work_dir: Path, notes: List[str]
) -> Optional[Config]:
    """The config of a start, else the newest one of the work dir."""
    dumped = sorted(
        [*work_dir.glob('*.py'), *work_dir.parent.glob('*.py')]
        if start == work_dir
        else work_dir.glob('*.py'),
        key=lambda path: path.stat().st_mtime,
    )
    for file in (start / 'vis_data' / 'config.py', *reversed(dumped)):
        if not file.is_file():
            continue
        try:
            return Config.fromfile(file, import_custom_modules=False)
        except Exception as error:  # whatever executing a file may raise
            notes.append(f'{file} cannot be read: {type(error).__name__}')
    notes.append('no config was found, so defaults are assumed')
    return None
