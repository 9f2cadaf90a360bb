"""Fixtures of more than one file."""

import logging
import warnings
from pathlib import Path
from typing import Callable, List

import pytest
import torch
from mmengine.logging import MMLogger

import mmagvm  # noqa: F401  registers everything

warnings.filterwarnings('ignore')
# threads cost toys more than they gain, especially on a busy machine
torch.set_num_threads(1)

FASTER_RCNN = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
#: Files whose tests start many processes or train real models, longest first.
SLOW = (
    *('tools', 'study', 'faults', 'recipes_train', 'ranks', 'benchmarks'),
    *('sharded_commands', 'htc_x', 'fully_shard_strategy', 'shards'),
    'check_setup',
    'every_optimizer',
    *('example', 'slurm', 'nodes', 'packaging', 'models', 'configs'),
)


def pytest_collection_modifyitems(
    config: pytest.Config, items: List[pytest.Item]
) -> None:
    """Mark slow files, and begin with them, so that none of them ends alone.

    Tests marked ``sweep`` run only if ``-m`` selects them.
    """
    if 'sweep' not in config.getoption('-m'):
        items[:] = [i for i in items if i.get_closest_marker('sweep') is None]
    order = {f'test_{name}': place for place, name in enumerate(SLOW)}
    for item in items:
        if item.path.stem in order:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


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


@pytest.fixture
def own(tmp_path: Path) -> Callable[..., Path]:
    """A user's own config: a few lines of their own and a package's base."""

    def write(
        base: str = FASTER_RCNN, lines: str = '', name: str = 'own.py'
    ) -> Path:
        file = tmp_path / 'configs' / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'_base_ = {base!r}\n{lines}\n')
        return file

    return write
