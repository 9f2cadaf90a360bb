"""Sends messages of the core, which imports no MMEngine, to the log."""

import logging

from mmengine.logging import print_log


class Forward(logging.Handler):
    """Passes records to the logger that MMEngine uses at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print_log(
            f'AGVM: {record.getMessage()}',
            logger='current',
            level=record.levelno,
        )


def forward_messages() -> None:
    """Install the handler, once however often this is called."""
    core = logging.getLogger('mmagvm')
    if not any(isinstance(handler, Forward) for handler in core.handlers):
        core.addHandler(Forward())
        core.setLevel(logging.INFO)
        core.propagate = False
