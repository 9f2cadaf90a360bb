"""Writes the results of runs as rows of a table, read from their logs."""

import os
from typing import Any, Dict, List

from mmagvm.analysis.run_log import Run
from mmagvm.analysis.run_summary import (
    batch_size,
    commit,
    config_name,
    divergence,
    metrics,
    progress,
    seed,
)


def result(run: Run) -> Dict[str, Any]:
    """The row of a run; None for values that it did not record."""
    return dict(
        run=run.name,
        config=config_name(run),
        batch_size=batch_size(run),
        seed=seed(run),
        trained=progress(run),
        diverged=divergence(run),
        metrics=metrics(run),
        commit=commit(run),
        log=os.path.relpath(run.logs[-1]) if run.logs else None,
        notes=run.notes,
    )


def markdown(results: List[Dict[str, Any]], tags: List[str]) -> str:
    """A table; '-' stands for values that were not recorded."""
    header = ['config', 'batch size', 'seed', 'trained', *tags]
    header += ['commit', 'log']
    lines = [header, ['---'] * len(header)]
    for row in results:
        values = [_cell(row['metrics'].get(tag)) for tag in tags]
        if row['diverged']:
            values = [row['diverged'], *['-'] * (len(tags) - 1)]
            if not tags:
                row = dict(row, trained=f'{row["trained"]}; {row["diverged"]}')
                values = []
        log = row['log'] and f'[log]({row["log"]})'
        cells = [row['config'], row['batch_size'], row['seed'], row['trained']]
        cells += [*values, row['commit'], log]
        lines.append([_cell(cell) for cell in cells])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _cell(value: Any) -> str:
    if value is None or value != value:
        return '-'
    return f'{value:.3f}' if isinstance(value, float) else str(value)
