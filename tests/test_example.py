"""The example without OpenMMLab: two ranks train torchvision's detector."""

import re
import sys

import pytest
from commands import ROOT, finish, free_port, start
from torchvision_ops import FOLDER, has_torchvision

EXAMPLE = ROOT / 'examples/torchvision_digits.py'
#: Runs it where no package of OpenMMLab can be imported.
RUN = """
import runpy, sys
for name in ('mmengine', 'mmcv', 'mmdet', 'mmseg'):
    sys.modules[name] = None
import torchvision_ops
torchvision_ops.import_torchvision()
sys.argv[:1] = []
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def train(*args):
    """The output of each of two ranks, started as torchrun does."""
    port = free_port()
    ranks = [
        start(
            *(sys.executable, '-c', RUN, EXAMPLE, *args),
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=2,
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=port,
            PYTHONPATH=':'.join(map(str, (ROOT, ROOT / 'tests', FOLDER))),
        )
        for rank in range(2)
    ]
    return [finish(process).splitlines() for process in ranks]


def losses_and_scales(lines):
    """By update, as printed: the loss, and each module's multiplier."""
    found = {}
    for line in lines:
        update, loss, scales = re.match(
            r'update (\d+): loss (.+), lr 0.0200 x (.+)', line
        ).groups()
        scale_of = dict(scale.split() for scale in scales.split(', '))
        found[int(update)] = float(loss), scale_of
    return found


@pytest.mark.skipif(not has_torchvision(), reason='needs torchvision')
def test_torchvision_trains_and_resumes(tmp_path):
    args = ('--checkpoint', tmp_path / 'checkpoint.pth')
    args = (*args, '--warmup', 1, '--every', 2, '--iterations')
    printed, nothing = train(*args, 12)
    assert nothing == []
    found = losses_and_scales(printed)
    assert list(found) == [2, 4, 6]
    losses = [loss for loss, _ in found.values()]
    assert losses[0] > losses[1] > losses[2] > 0
    _, scale_of = found[6]
    assert scale_of.pop('backbone.body') == '1.000'
    assert scale_of.keys() == {'backbone.fpn', 'rpn', 'roi_heads'}
    assert '1.000' not in scale_of.values()

    (resumed, *printed), nothing = train(*args, 16)
    assert resumed == 'resumes after update 6'
    assert nothing == []
    found = losses_and_scales(printed)
    assert list(found) == [8]
    loss, scale_of = found[8]
    assert 0 < loss < losses[0]
    assert scale_of['backbone.body'] == '1.000'
