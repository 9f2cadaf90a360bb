"""The result of a check."""

from dataclasses import asdict, dataclass, field
from typing import Any, Dict, List, Sequence

PASSED, FAILED, NOT_APPLICABLE = 'passed', 'failed', 'not applicable'


class NotApplicableError(Exception):
    """This machine lacks what the check needs; the message names it."""


class CheckFailedError(Exception):
    """Something is wrong; the message says what, and what to do.

    Raised after the last collective of a check, so that no rank waits in it.
    """


def fail_if(faults: Sequence[str]) -> None:
    """Raise the first fault, if there is one."""
    for fault in faults:
        raise CheckFailedError(fault)


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Args:
        name: Of the check.
        status: 'passed', 'failed' or 'not applicable'.
        sentence: The finding, what to do, or why it does not apply.
        numbers: Measured values, with the unit in the name.
        seconds: The time of the check.
        traceback: Of an unexpected error.
    """

    name: str
    status: str
    sentence: str
    numbers: Dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    traceback: str = ''

    def as_dict(self) -> Dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def line(self, name_width: int) -> str:
        """For the table."""
        return (
            f'{self.status:14}  {self.name:{name_width}}  {self.sentence}'
        ).rstrip()


def of_all_ranks(results: Sequence[Result]) -> Result:
    """The result of a check from those of all ranks, in order.

    A check that fails on one rank fails. Numbers are the largest of any rank.
    """
    failed = [
        rank for rank, result in enumerate(results) if result.status == FAILED
    ]
    shown = results[failed[0] if failed else 0]
    sentence = shown.sentence
    if failed and len(results) > 1:
        sentence = f'{_named(failed)}: {sentence}'
    numbers: Dict[str, float] = {}
    for result in results:
        for key, value in result.numbers.items():
            numbers[key] = max(value, numbers.get(key, value))
    seconds = max(result.seconds for result in results)
    return Result(
        shown.name, shown.status, sentence, numbers, seconds, shown.traceback
    )


def _named(ranks: List[int]) -> str:
    named = ', '.join(map(str, ranks[:8])) + (', ...' if ranks[8:] else '')
    return f'rank {named}' if len(ranks) == 1 else f'ranks {named}'
