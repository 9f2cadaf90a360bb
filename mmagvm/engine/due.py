"""Checks, before and after a run, whether it measures anything."""

from typing import Optional

from mmagvm.core.agvm import AGVM


def too_few_due(agvm: AGVM, updates: int) -> Optional[str]:
    """Why the rest of a run measures too little.

    Args:
        agvm: At the start of the run, or where it is resumed.
        updates: Number of updates that remain, with all their micro-batches.

    Returns:
        A sentence with what to write; None if it measures enough.
    """
    settings, first = agvm.settings, agvm.update
    last = first + updates
    due = settings.due_between(first + (not agvm.can_measure), last)
    # no update is left, or measurements follow or are done
    if updates < 1 or len(due) > 1 or agvm.modulator.measured:
        return None
    if settings.begin >= last:
        return (
            f'begin={settings.begin} is after the last update, {last - 1}, so '
            'none is measured: set optim_wrapper.begin to a lower number, '
            f'such as {first + updates // 10}'
        )
    if settings.end is not None and settings.end <= first:
        return (
            f'end={settings.end} is not after the next update, {first}, so '
            'none is measured: set optim_wrapper.end to a higher number, or '
            'to None'
        )
    left = last - max(first, settings.begin)
    if settings.interval >= left > 1:
        return (
            f'interval={settings.interval} is not less than the {left} '
            f'updates that remain from begin={settings.begin} to the last '
            f'one, so {len(due) or "none"} is measured: set '
            'optim_wrapper.interval to a lower number, such as '
            f'{max(1, left // 10)}'
        )
    if not due:
        return (
            f'begin={settings.begin}, end={settings.end} and '
            f'interval={settings.interval} leave no update to measure from '
            f'{first} to {last - 1}, as the optimizer has no state before '
            'its first step: set optim_wrapper.begin to 1 or more, or '
            'optim_wrapper.interval to a lower number'
        )
    return None


def nothing_measured(agvm: AGVM, first: int, updates: int) -> Optional[str]:
    """Why a run that has ended has measured nothing.

    Args:
        agvm: At the end of the run.
        first: Its first update.
        updates: Number of updates that it should have made.

    Returns:
        A sentence. None if nothing was due, and the run was resumed from one
        that had measured.
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


def never_dropped(agvm: AGVM) -> Optional[str]:
    """Why ``restart_at_lr_drop`` has changed nothing.

    Args:
        agvm: At the end of the run.

    Returns:
        A sentence; None if the learning rate has dropped, or need not.
    """
    lr_drop = agvm.modulator.lr_drop
    if lr_drop is None or lr_drop.drops or not agvm.modulator.measured:
        return None
    return (
        'restart_at_lr_drop=True changed nothing, as no measured update had '
        'less than half of the highest learning rate before'
    )
