"""Fixtures of more than one file."""

import logging
import warnings
from typing import List

import pytest
import torch
from mmengine.logging import MMLogger

import mmagvm  # noqa: F401  registers everything

warnings.filterwarnings('ignore')
# threads cost more than toys gain from them, above all on a busy machine
torch.set_num_threads(1)


@pytest.fixture
def log() -> List[str]:
    """The messages that MMEngine's current logger gets, as they come."""
    messages: List[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = MMLogger.get_current_instance(), Collect()
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
