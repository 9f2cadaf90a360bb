"""Messages of the core, which knows no MMEngine, in the log of the run."""

import logging

from mmengine.logging import print_log


class Forward(logging.Handler):
    """Hands records to the logger that MMEngine uses at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print_log(
            f'AGVM: {record.getMessage()}',
            logger='current',
            level=record.levelno,
        )


def forward_messages() -> None:
    """Once, whatever is imported how often."""
    core = logging.getLogger('mmagvm')
    if not any(isinstance(handler, Forward) for handler in core.handlers):
        core.addHandler(Forward())
        core.setLevel(logging.INFO)
        core.propagate = False
