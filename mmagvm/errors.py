"""Errors whose message is enough: commands print it without a traceback."""

from functools import wraps
from typing import Callable, NoReturn


class ReportedError(Exception):
    """An error whose message says what happened and what to do."""


class UsageError(ReportedError, ValueError):
    """An argument, a setting or a file that cannot be used."""


class LostRanksError(ReportedError, RuntimeError):
    """Other ranks did not join, or are gone."""


def refuse(message: str) -> NoReturn:
    """Raise a :class:`UsageError`."""
    raise UsageError(message)


def command(main: Callable[[], None]) -> Callable[[], None]:
    """Make the ``main`` of a command exit with the message of such an error.

    The exit status is 1.
    """

    @wraps(main)
    def ending() -> None:
        try:
            main()
        except ReportedError as error:
            raise SystemExit(str(error) or 1) from None

    return ending
