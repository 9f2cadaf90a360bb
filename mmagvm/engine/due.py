"""Whether a run measures at all: what can be told before, and after it."""

from typing import Optional

from mmagvm.core.agvm import AGVM


def too_few_due(agvm: AGVM, updates: int) -> Optional[str]:
    """Why the rest of a run measures nothing that matters.

    Args:
        agvm: At the start, or where the run is resumed.
        updates: That are still to come, with all of their micro-batches.

    Returns:
        A sentence with what to write; None if all is well.
    """
    settings, first = agvm.settings, agvm.update
    last = first + updates
    due = settings.due_between(first + (not agvm.can_measure), last)
    # the end was reached before, or all that could be measured is
    if updates < 1 or len(due) > 1 or agvm.modulator.measured:
        return None
    if settings.begin >= last:
        return (
            f'begin={settings.begin} is behind the last update, {last - 1}, '
            'so none is measured: set optim_wrapper.begin to less, such as '
            f'{first + updates // 10}'
        )
    if settings.end is not None and settings.end <= first:
        return (
            f'end={settings.end} is before the first update to come, '
            f'{first}, so none is measured: set optim_wrapper.end to more, '
            'or to None'
        )
    left = last - max(first, settings.begin)
    if settings.interval >= left > 1:
        return (
            f'interval={settings.interval} is not less than the {left} '
            f'updates that are left from begin={settings.begin} to the last '
            f'one, so {len(due) or "none"} is measured: set '
            f'optim_wrapper.interval to less, such as {max(1, left // 10)}'
        )
    if not due:
        return (
            f'begin={settings.begin}, end={settings.end} and '
            f'interval={settings.interval} leave no update of {first} to '
            f'{last - 1} to be measured, as the optimizer has no state '
            'before its first step: set optim_wrapper.begin to 1 or more, or '
            'optim_wrapper.interval to less'
        )
    return None


def nothing_measured(agvm: AGVM, first: int, updates: int) -> Optional[str]:
    """Why a run that has ended has measured nothing.

    Args:
        agvm: At its end.
        first: The update that it began with.
        updates: That it should have made.

    Returns:
        A sentence; None if nothing was due, and need not have been, since
        the run was resumed from one that had measured.
    """
    settings, reasons = agvm.settings, agvm.why_missed()
    if not settings.due_between(first, first + updates):
        if agvm.modulator.measured or updates < 1:
            return None
        reasons = (
            f'none of them was due with begin={settings.begin}, '
            f'end={settings.end} and interval={settings.interval}'
        )
    elif not reasons:
        reasons = (
            'the optimizer made no step: in train_step call '
            'optim_wrapper.update_params(loss)'
        )
    return f'measured 0 of {updates} updates, because {reasons}'
