"""Runs checks one after the other, and always comes to an end."""

import os
import threading
import time
import traceback
from typing import Callable, Dict, List, Sequence, Tuple

from mmagvm.checks.ranks import Ranks
from mmagvm.checks.result import (
    FAILED,
    NOT_APPLICABLE,
    PASSED,
    CheckFailedError,
    NotApplicableError,
    Result,
    of_all_ranks,
)

#: The finding, in a sentence and in numbers.
Found = Tuple[str, Dict[str, float]]
Check = Callable[[Ranks], Found]
#: Seconds by which rank 0, which reports, ends before the others.
AHEAD = 5.0


def run_checks(
    checks: Sequence[Tuple[str, Check]],
    ranks: Ranks,
    patience: float,
    show: Callable[[Result], None],
    give_up: Callable[[List[Result]], None],
) -> List[Result]:
    """Run every check on all ranks.

    Args:
        checks: By name.
        ranks: All ranks, each of which runs the same checks.
        patience: Seconds in which a check must end on all ranks. If it does
            not, ranks hang in a collective, and later results would mean
            nothing. So the process ends, with status 1.
        show: Called with each result as it comes.
        give_up: Called with all results on rank 0, before such an end.

    Returns:
        The results of all ranks, in the order of ``checks``.
    """
    results: List[Result] = []
    for place, (name, check) in enumerate(checks):
        key = f'result of {name}'

        def stuck(
            place: int = place, name: str = name, key: str = key
        ) -> None:
            # in a thread, as the main one may hang in C++
            if ranks.rank:
                time.sleep(AHEAD)
                os._exit(1)
            ends = [_stuck(name, ranks.reported(key), patience)]
            ends += [
                Result(
                    later,
                    NOT_APPLICABLE,
                    f'ranks are out of step since "{name}"',
                )
                for later, _ in checks[place + 1 :]
            ]
            for result in ends:
                show(result)
            give_up(results + ends)
            os._exit(1)

        timer = threading.Timer(patience, stuck)
        timer.daemon = True
        timer.start()
        own = run_one(name, check, ranks)
        every = ranks.gather(key, own.as_dict())
        timer.cancel()
        results.append(of_all_ranks([Result(**result) for result in every]))
        show(results[-1])
    return results


def run_one(name: str, check: Check, ranks: Ranks) -> Result:
    """The result on this rank; an error is a failure."""
    begin = time.monotonic()
    numbers: Dict[str, float] = {}
    trace = ''
    try:
        sentence, numbers = check(ranks)
        status = PASSED
    except NotApplicableError as reason:
        status, sentence = NOT_APPLICABLE, str(reason)
    except CheckFailedError as fault:
        status, sentence = FAILED, str(fault)
    except Exception as error:
        status, sentence = FAILED, f'{type(error).__name__}: {error}'
        trace = traceback.format_exc()
    seconds = time.monotonic() - begin
    return Result(name, status, sentence, numbers, seconds, trace)


def _stuck(name: str, reported: List[object], patience: float) -> Result:
    """The result of a check that does not end on some ranks."""
    for rank, one in enumerate(reported):
        if isinstance(one, dict) and one['status'] == FAILED:
            sentence = f'rank {rank}: {one["sentence"]}'
            return Result(**{**one, 'sentence': sentence})
    missing = [rank for rank, one in enumerate(reported) if one is None]
    sentence = (
        f'rank {missing[0]} did not end within {patience:g} seconds: read '
        'what it printed. If it printed nothing, ranks cannot reach each '
        'other: set NCCL_DEBUG=INFO, and NCCL_SOCKET_IFNAME '
        '(GLOO_SOCKET_IFNAME without GPUs) to the network interface between '
        'nodes. If it is only slow, give a longer --timeout'
    )
    return Result(name, FAILED, sentence, seconds=patience)
