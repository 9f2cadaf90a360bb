"""Several nodes, in network namespaces of one machine."""

import json
import os
import signal

import pytest
import torch
from commands import assert_equal, finish, load_checkpoint, run, write_config
from network import Network, ip, reason_against

why_not = reason_against()
pytestmark = pytest.mark.skipif(why_not is not None, reason=str(why_not))

#: Seconds that ranks wait for each other in a collective.
PATIENCE = 20


def launch(config, ranks, *args):
    return (
        *('bash', 'tools/dist_train.sh', config, ranks, *args),
        *('--cfg-options', f'env_cfg.dist_cfg.timeout={PATIENCE}'),
    )


def train_on(nodes, config, ranks, *args, codes=None, **env):
    """Train on nodes with so many ranks each; the output of each node."""
    codes = codes or [0] * len(nodes.nodes)
    processes = nodes.start(*launch(config, ranks, *args), **env)
    try:
        return [
            finish(process, code) for process, code in zip(processes, codes)
        ]
    finally:
        for process in processes:  # where another node has failed
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope='module')
def one_node(tmp_path_factory):
    """Work dirs of runs on this machine alone, by number of ranks."""
    work_dirs = {}
    for ranks in (3, 4):
        work_dir = tmp_path_factory.mktemp('one') / f'run{ranks}'
        run(*launch(write_config(work_dir), ranks))
        work_dirs[ranks] = work_dir
    return work_dirs


def checkpoint(work_dir):
    return load_checkpoint(work_dir / 'epoch_2.pth')


def losses(work_dir):
    scalars = next(work_dir.glob('*/vis_data/scalars.json')).read_text()
    return [json.loads(line)['loss'] for line in scalars.splitlines()]


@pytest.mark.parametrize('nodes, ranks', [(2, 2), (3, 1)])
def test_nodes_equal_one_node(one_node, tmp_path, nodes, ranks):
    """Losses, weights, optimizer and AGVM state are bitwise equal."""
    with Network(nodes) as network:
        train_on(network, write_config(tmp_path / 'run'), ranks)
    whole = one_node[nodes * ranks]
    assert losses(tmp_path / 'run') == losses(whole)
    ours, other = checkpoint(tmp_path / 'run'), checkpoint(whole)
    assert ours['optimizer']['agvm']['measured'] > 0
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        assert_equal(ours[part], other[part], part)


def test_nodes_are_checked(tmp_path):
    with Network(2) as network:
        processes = network.start(
            *('bash', 'tools/dist_check.sh', 1, '--work-dir', tmp_path)
        )
        outputs = [finish(process) for process in processes]
    report = json.loads((tmp_path / 'check_setup.json').read_text())
    status = {result['name']: result['status'] for result in report['results']}
    assert report['passed']
    assert status['all-reduce between nodes'] == 'passed'
    assert status['all-reduce within a node'] == 'not applicable'
    assert '0 failed' in outputs[0]
    assert 'passed' not in outputs[1]  # only rank 0 reports


def test_cut_link_is_reported_and_restarting_resumes(one_node, tmp_path):
    config = write_config(tmp_path / 'run', hook='CutLink')
    with Network(3) as network:
        cut = ' '.join(('ip', *network.link(2), 'down'))
        outputs = train_on(network, config, 1, codes=[1, 1, 1], CUT_LINK=cut)
        ip(*network.link(2), 'up')
        resumed = train_on(network, config, 1, '--resume')
    for node, output in enumerate(outputs):
        assert f'Rank {node} on node {node} lost the others' in output
        assert f'env_cfg.dist_cfg.timeout={PATIENCE} seconds' in output
        assert 'again, with --resume' in output
        assert 'Traceback' not in output
    assert f'{tmp_path}/run/epoch_1.pth' in resumed[0]
    ours, whole = checkpoint(tmp_path / 'run'), checkpoint(one_node[3])
    # from 3 ranks on, DDP rounds the first update after a restart otherwise
    torch.testing.assert_close(ours['state_dict'], whole['state_dict'])
    assert (
        ours['optimizer']['agvm']['measured']
        == (whole['optimizer']['agvm']['measured'])
    )
