"""Faults of machines, files and networks, each caused for real."""

import os
import random
import shutil
import socket
import sys

import pytest
import torch
from commands import (
    assert_equal,
    finish,
    load_checkpoint,
    run,
    start,
    write_config,
)
from mmengine.config import Config

from mmagvm.errors import UsageError
from mmagvm.launch import resume
from mmagvm.launch.rendezvous import timeout_seconds
from mmagvm.launch.resume import choose, damage


def train(config, *args, ranks=2, **env):
    if ranks == 1:
        return run(sys.executable, 'tools/train.py', config, *args, **env)
    return run('bash', 'tools/dist_train.sh', config, ranks, *args, **env)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The work dir of two epochs on two ranks, never interrupted."""
    work_dir = tmp_path_factory.mktemp('whole') / 'run'
    train(write_config(work_dir))
    return work_dir


@pytest.fixture
def work_dir(whole, tmp_path):
    """A copy of it, to damage."""
    copy = shutil.copytree(whole, tmp_path / 'run')
    (copy / 'last_checkpoint').write_text(str(copy / 'epoch_2.pth'))
    return copy


def assert_same_training(work_dir, whole):
    ours, other = (
        load_checkpoint(folder / 'epoch_2.pth') for folder in (work_dir, whole)
    )
    assert ours['optimizer']['agvm']['measured'] > 0
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        assert_equal(ours[part], other[part], part)


# -- a rank is killed


@pytest.mark.host
def test_killed_rank_is_restarted_and_resumes(whole, tmp_path):
    """By itself, from its own last checkpoint, to the same bits."""
    work_dir = tmp_path / 'run'
    work_dir.mkdir()  # with what an earlier run left, not to be picked up
    shutil.copy(whole / 'epoch_1.pth', work_dir / 'epoch_9.pth')
    (work_dir / 'last_checkpoint').write_text(f'{work_dir}/epoch_9.pth')
    output = train(write_config(work_dir, hook='KillRank'), MAX_RESTARTS='1')
    assert 'exitcode: -9' in output
    assert f'resume: from {work_dir}/epoch_1.pth (restart 1)' in output
    assert output.count('Saving checkpoint at 1 epochs') == 1
    assert_same_training(work_dir, whole)


def test_restart_with_nothing_saved_begins_as_at_launch(work_dir, monkeypatch):
    """Also where the work dir holds an earlier run's checkpoints."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(resume, 'launcher_store', lambda _: store)
    seen = []
    for restart in range(3):
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', str(restart))
        if restart == 2:
            (work_dir / 'last_checkpoint').write_text(
                str(work_dir / 'epoch_1.pth')
            )
        cfg = Config(dict(work_dir=str(work_dir), load_from='weights.pth'))
        note = resume.choose_checkpoint(cfg, None)
        seen.append((cfg.get('resume'), cfg.load_from, note))
    nothing = (
        'resume: nothing was saved since launch, so the run starts again from '
        'the beginning (restart 1)'
    )
    newest = str(work_dir / 'epoch_1.pth')
    assert seen == [
        (None, 'weights.pth', ''),
        (None, 'weights.pth', nothing),
        (True, newest, f'resume: from {newest} (restart 2)'),
    ]


# -- a checkpoint is damaged


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path, position=None):
    data = bytearray(path.read_bytes())
    data[position or len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b'')


DAMAGES = [truncate, flip_bit, empty]


@pytest.mark.parametrize('spoil', DAMAGES)
def test_damaged_checkpoint_is_passed_over(work_dir, spoil):
    spoil(work_dir / 'epoch_2.pth')
    path, note, error = choose(str(work_dir), 'auto')
    assert path == str(work_dir / 'epoch_1.pth') and not error
    assert f'newest checkpoint {work_dir}/epoch_2.pth is damaged' in note
    assert note.endswith(f'the one before it, {work_dir}/epoch_1.pth')


@pytest.mark.parametrize('spoil', DAMAGES)
def test_no_readable_checkpoint_is_an_error(work_dir, spoil):
    spoil(work_dir / 'epoch_2.pth')
    spoil(work_dir / 'epoch_1.pth')
    path, _, error = choose(str(work_dir), 'auto')
    assert path is None
    assert f'{work_dir}/epoch_2.pth is damaged' in error
    assert 'name another with --resume PATH' in error


def test_flipped_bits_are_found(whole, tmp_path):
    """Any flipped bit is noticed, or changes nothing."""
    path, found = tmp_path / 'epoch_1.pth', 0
    good = load_checkpoint(whole / 'epoch_1.pth')
    size = (whole / 'epoch_1.pth').stat().st_size
    for position in random.Random(0).sample(range(size), 300):
        shutil.copy(whole / 'epoch_1.pth', path)
        flip_bit(path, position)
        if damage(path):
            found += 1
            continue
        ours = load_checkpoint(path)
        for part in ('state_dict', 'optimizer', 'meta'):
            assert_equal(ours[part], good[part], f'{position}: {part}')
    assert found > 30


def test_last_checkpoint_file_is_damaged_or_moved(work_dir, tmp_path):
    newest = str(work_dir / 'epoch_2.pth')
    for text in ('', '/moved/from/epoch_2.pth', '\x00\x01'):
        (work_dir / 'last_checkpoint').write_text(text)
        assert choose(str(work_dir), 'auto').path == newest
    (work_dir / 'last_checkpoint').unlink()
    assert choose(str(work_dir), 'auto').path == newest
    path, note, _ = choose(str(tmp_path / 'nowhere'), 'auto')
    assert path is None and 'starts from the beginning' in note


def test_named_damaged_checkpoint_is_refused(work_dir):
    flip_bit(work_dir / 'epoch_2.pth')
    output = train(
        write_config(work_dir),
        *('--resume', work_dir / 'epoch_2.pth'),
        code=1,
    )
    damaged = f'--resume {work_dir}/epoch_2.pth: the file is damaged'
    assert output.count(damaged) == 1
    assert f'before it is {work_dir}/epoch_1.pth' in output
    assert 'Traceback' not in output and 'Saving' not in output


# -- another world size and accumulation


def test_checkpoint_of_two_ranks_goes_on_with_one(work_dir):
    """And from the last readable one, as --resume does anyway."""
    truncate(work_dir / 'epoch_2.pth')
    output = train(
        write_config(work_dir),
        *('--resume', '--cfg-options', 'optim_wrapper.accumulative_counts=2'),
        ranks=1,
    )
    assert f'{work_dir}/epoch_2.pth is damaged' in output
    batch = "'ranks': 2, 'images_per_rank': 4, 'accumulative_counts': 1"
    assert batch in output
    assert 'lr_scale keeps its values' in output
    before, after = (
        load_checkpoint(work_dir / f'epoch_{epoch}.pth')['optimizer']['agvm']
        for epoch in (1, 2)
    )
    assert after['measured'] > before['measured'] > 0


# -- nodes and ranks that do not meet


@pytest.fixture(scope='module')
def lonely_nodes():
    """The output of one of two nodes that do not meet, by case."""
    mute = socket.socket()  # accepts connections and never answers
    mute.bind(('127.0.0.1', 0))
    mute.listen()
    no_host = dict(NODE_RANK='1', MASTER_ADDR='no-such-host.invalid')
    cases = {
        'node 1 never comes': dict(NODE_RANK='0'),
        'nothing listens': dict(NODE_RANK='1'),
        'no such host': no_host,
        'no such host, seen from node 0': dict(no_host, NODE_RANK='0'),
        'another program listens': dict(
            NODE_RANK='1', PORT=str(mute.getsockname()[1])
        ),
    }
    nodes = {
        name: start(
            *('bash', 'tools/dist_train.sh', 'config.py', '1'),
            **dict(NNODES='2', TIMEOUT='5', **env),
        )
        for name, env in cases.items()
    }
    yield {name: finish(node, code=1) for name, node in nodes.items()}
    mute.close()


@pytest.mark.parametrize(
    'case, named',
    [
        ('node 1 never comes', 'NNODES=2 and NODE_RANK=0'),
        ('nothing listens', 'MASTER_ADDR=127.0.0.1 is node 0'),
        ('no such host', 'MASTER_ADDR=no-such-host.invalid'),
        ('no such host, seen from node 0', 'MASTER_ADDR=no-such-host.inv'),
        ('another program listens', 'nothing else uses PORT='),
    ],
)
def test_lonely_node_tells_what_to_check(lonely_nodes, case, named):
    output = lonely_nodes[case]
    assert 'the nodes did not meet within 5 seconds' in output
    assert named in output
    for name in ('firewall', 'NCCL_SOCKET_IFNAME', 'TIMEOUT=5'):
        assert name in output
    assert 'Traceback' not in output


def test_rank_that_never_joins_is_named(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(
        "if __import__('os').environ['RANK'] == '1':\n"
        "    __import__('time').sleep(1000)\n"
    )
    output = train(config, TIMEOUT='5', code=1)
    assert '1 of 2 ranks did not come within TIMEOUT=5 seconds: rank 1' in (
        output
    )
    assert 'no rank has stopped or hangs' in output
    assert 'Traceback' not in output


def test_rank_that_hangs_in_the_first_collective(tmp_path):
    """It joins, and then hangs: the others end all the same."""
    script = tmp_path / 'script.py'
    script.write_text("""
import contextlib
import os
import time

from mmagvm.launch import runner
from mmengine.config import Config

if os.environ['RANK'] == '1':
    runner.init_process_group = lambda *args: time.sleep(1000)
    runner.deadline = lambda *args: contextlib.nullcontext()
runner.join_ranks(Config(dict(launcher='pytorch')))
""")
    output = run(
        *(sys.executable, 'tools/dist_run.py', '--nproc_per_node=2', script),
        code=1,
        TIMEOUT='12',
    )
    assert 'not reach each other within TIMEOUT=12 seconds' in output
    assert 'GLOO_SOCKET_IFNAME' in output and 'Traceback' not in output


def test_node_that_restarts_later_is_waited_for(tmp_path):
    """Another node may notice a loss as late as a collective does."""
    script = tmp_path / 'script.py'
    script.write_text("""
import os
import time

from mmagvm.launch import runner
from mmengine.config import Config

os.environ.update(TORCHELASTIC_RESTART_COUNT='1', GROUP_WORLD_SIZE='2')
if os.environ['RANK'] == '1':
    time.sleep(10)
dist_cfg = dict(timeout=60)
runner.join_ranks(
    Config(dict(launcher='pytorch', env_cfg=dict(dist_cfg=dist_cfg)))
)
print('met')
runner.leave_ranks()
""")
    output = run(
        *(sys.executable, 'tools/dist_run.py', '--nproc_per_node=2', script),
        TIMEOUT='5',
    )
    assert output.count('met') == 2


def test_nothing_of_the_group_is_left(tmp_path):
    """Its threads could abort a Python that is ending."""
    script = tmp_path / 'script.py'
    script.write_text("""
import pathlib

import torch
from mmengine.config import Config
from torch.nn.parallel import DistributedDataParallel

from mmagvm.launch.runner import join_ranks, leave_ranks


class Runner:
    def __init__(self):
        self.model = DistributedDataParallel(torch.nn.Linear(2, 2))
        self.hook = lambda: self  # as a Runner's, in a cycle


def threads():
    names = pathlib.Path('/proc/self/task').glob('*/comm')
    return sum('gloo' in name.read_text() for name in names)


join_ranks(Config(dict(launcher='pytorch')))
runner = Runner()
runner.model(torch.ones(2)).sum().backward()
before = threads()
del runner
leave_ranks()
print('gloo threads:', before > 0, threads())
""")
    output = run(
        *(sys.executable, 'tools/dist_run.py', '--nproc_per_node=1', script),
        code=0,
    )
    assert 'gloo threads: True 0' in output


@pytest.mark.parametrize('timeout', ['soon', '0', '-1', '1.5'])
def test_bad_timeout_is_refused(timeout, monkeypatch):
    monkeypatch.setenv('TIMEOUT', timeout)
    with pytest.raises(
        UsageError, match=f'TIMEOUT={timeout}: write the seconds'
    ):
        timeout_seconds()
