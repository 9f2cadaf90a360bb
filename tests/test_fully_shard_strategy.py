"""FSDP2 as a strategy: the same training, checkpoints and logs as DDP's."""

import os

import pytest
from ranks import run_ranks
from sharded_configs import sharded_cfg

from mmagvm.launch.runner import build_runner


def trained(rank, folder, name, **settings):
    """A run in which all ranks take part; what is left of it."""
    os.environ['LOCAL_RANK'] = str(rank)
    resume = settings.pop('resume', None)
    cfg = sharded_cfg(folder / name, **{'accumulative_counts': 1, **settings})
    if resume is not None:
        cfg.resume, cfg.load_from = True, str(folder / resume)
    runner = build_runner(cfg)
    runner.train()
    return runner.optim_wrapper.agvm.modulator.history


def on_ranks(rank, world_size, folder):
    found = {}
    for optimizer in ('SGD', 'AdamW'):
        options = dict(optimizer=optimizer)
        for name, more in (
            ('whole', {}),
            ('ddp', dict(sharded=False)),
            ('resumed', dict(resume=f'{optimizer}-whole/epoch_1.pth')),
            ('from ddp', dict(resume=f'{optimizer}-ddp/epoch_1.pth')),
            (
                'to ddp',
                dict(sharded=False, resume=f'{optimizer}-whole/epoch_1.pth'),
            ),
        ):
            key = f'{optimizer}-{name}'
            found[key] = trained(rank, folder, key, **options, **more)
    return found


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sharded')
    run_ranks(2, on_ranks, folder)
    return folder
