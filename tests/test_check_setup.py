"""The checks pass here, and fail where something is broken."""

import json
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from commands import free_port, run
from ranks import run_ranks

from mmagvm.checks import collectives, environment, norm_layers
from mmagvm.checks.checklist import checklist
from mmagvm.checks.cost import time_of_updates
from mmagvm.checks.measurement import check_variance, same_multipliers
from mmagvm.checks.ranks import Ranks
from mmagvm.checks.result import (
    FAILED,
    NOT_APPLICABLE,
    PASSED,
    Result,
    of_all_ranks,
)
from mmagvm.checks.resume import resumed_run
from mmagvm.checks.running import run_checks, run_one
from mmagvm.core import AGVM
from mmagvm.core.modulator import Modulator


def on_ranks(rank, world_size, folder, port):
    """The results of both ranks in each case, where rank 1 is broken."""
    store = dist.TCPStore('127.0.0.1', port, world_size, rank == 0)
    os.environ['LOCAL_RANK'] = str(rank)
    results = []
    for case, (check, breakage, *_) in enumerate(CASES):
        ranks = Ranks(
            rank,
            world_size,
            1 if check is collectives.between_nodes else 2,
            dist.PrefixStore(str(case), store),
            dict(type='MMDistributedDataParallel', device_ids=None),
        )
        if check is resumed_run:
            check = partial(check, work_dir=folder / str(case))
        with pytest.MonkeyPatch.context() as patch:
            # a state that is lost on one rank only makes the ranks hang
            everywhere = breakage in (forgets_agvm, forgets_moments)
            if breakage is not None and (rank == 1 or everywhere):
                breakage(patch)
            own = run_one('it', check, ranks)
        gathered = ranks.gather('result', own.as_dict())
        results.append(of_all_ranks([Result(**result) for result in gathered]))
    dist.barrier()  # the store lives on rank 0
    return results


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checks')
    first, second = run_ranks(2, on_ranks, folder, free_port())
    assert first == second
    return first


def wrong_sum(patch):
    real = dist.all_reduce

    def all_reduce(tensor, *args, **kwargs):
        real(tensor, *args, **kwargs)
        tensor.mul_(2)

    patch.setattr(dist, 'all_reduce', all_reduce)


def other_torch(patch):
    patch.setattr(torch, '__version__', '2.0.0')


def no_operators(patch):
    import mmcv.ops

    def missing(*args, **kwargs):
        raise RuntimeError('no kernel image is available')

    patch.setattr(mmcv.ops, 'nms', missing)


def wrong_variance(patch):
    real = Modulator.update

    def update(self, at, measurement, lr):
        measurement.variance.mul_(1.1)
        real(self, at, measurement, lr)

    patch.setattr(Modulator, 'update', update)


def never_measures(patch):
    patch.setattr(AGVM, 'begin_update', lambda self, loss_scale=None: None)


def other_multiplier(patch):
    real = Modulator.update

    def update(self, at, measurement, lr):
        real(self, at, measurement, lr)
        self.lr_scale['neck'] *= 1 + 1e-15

    patch.setattr(Modulator, 'update', update)


def wrong_statistics(patch):
    import mmagvm.recipes.cgbn as cgbn

    real = cgbn.group_batch_norm

    def group_batch_norm(*args):
        return 1.001 * real(*args)

    patch.setattr(cgbn, 'group_batch_norm', group_batch_norm)


def forgets_agvm(patch):
    patch.setattr(AGVM, 'load_state_dict', lambda self, state: None)


def forgets_moments(patch):
    real = torch.optim.AdamW.load_state_dict

    def load_state_dict(self, state):
        real(self, state)
        self.state.clear()

    patch.setattr(torch.optim.AdamW, 'load_state_dict', load_state_dict)


def sees_no_checkpoint(patch):
    real = Path.exists
    patch.setattr(
        Path, 'exists', lambda self: self.stem != 'epoch_1' and real(self)
    )


VARIANCE = [
    (partial(check_variance, estimator, dtype), wrong_variance, FAILED, part)
    for estimator in ('split', 'pairs')
    for dtype, part in ((None, 'fp32'), (torch.bfloat16, 'bf16'))
]
VARIANCE += [
    (
        partial(check_variance, estimator, None, sharded=True),
        *(wrong_variance, FAILED, 'in shards)'),
    )
    for estimator in ('split', 'pairs')
]
#: A check, what is wrong on rank 1, the result, and a part of its sentence.
CASES = [
    (environment.same_versions, other_torch, FAILED, 'torch is 2.0.0'),
    (environment.mmcv_ops, no_operators, FAILED, 'no kernel image'),
    (collectives.within_node, wrong_sum, FAILED, 'is 6 and should be 3'),
    (collectives.between_nodes, None, PASSED, '2 ranks sum 4 MiB'),
    *VARIANCE,
    (same_multipliers, other_multiplier, FAILED, 'lr_scale of neck is'),
    (norm_layers.cross_gpu_batch_norm, wrong_statistics, FAILED, 'is off by'),
    (resumed_run, forgets_agvm, FAILED, 'weights are off by'),
    (resumed_run, forgets_moments, FAILED, 'weights are off by'),
    (resumed_run, sees_no_checkpoint, FAILED, 'that all nodes share'),
]


@pytest.mark.parametrize('case', range(len(CASES)))
def test_check_fails_where_something_is_broken(found, case):
    *_, status, part = CASES[case]
    assert found[case].status == status, found[case].sentence
    assert part in found[case].sentence
    if status == FAILED:
        assert re.match('ranks? (0, 1|1): ', found[case].sentence)


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
@pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.float16])
def test_variance_on_one_rank(estimator, dtype):
    check = partial(check_variance, estimator, dtype)
    result = run_one('it', check, Ranks.here())
    assert result.status == PASSED, result.sentence
    # in mixed precision, too: brute force rounds as training does
    assert result.numbers['largest_error'] < 1e-5


def test_measurement_that_never_comes_fails(monkeypatch):
    never_measures(monkeypatch)
    result = run_one(
        'it', partial(check_variance, 'pairs', None), Ranks.here()
    )
    assert result.status == FAILED
    assert 'was not measured (pairs, SGD, fp32, 2 micro' in result.sentence


@pytest.mark.parametrize(
    'check, why',
    [
        (collectives.within_node, 'one rank on each node'),
        (collectives.between_nodes, 'one node'),
        (same_multipliers, 'one rank'),
        (norm_layers.cross_gpu_batch_norm, 'one rank on each node'),
        (norm_layers.sync_batch_norm, 'one rank'),
    ],
)
def test_what_does_not_apply_says_why(check, why):
    result = run_one('it', check, Ranks.here())
    assert result.status == NOT_APPLICABLE
    assert why in result.sentence


def test_times_are_reported_and_never_fail():
    result = run_one('it', time_of_updates, Ranks.here())
    assert result.status == PASSED
    assert result.numbers['milliseconds'] > 0


def test_failed_on_one_rank_is_failed():
    results = [
        Result('it', PASSED, 'fine', dict(error=1.0), 1.0),
        Result('it', FAILED, 'broken', dict(error=3.0), 2.0),
        Result('it', FAILED, 'broken too', {}, 0.5),
    ]
    assert of_all_ranks(results) == Result(
        'it', FAILED, 'ranks 1, 2: broken', dict(error=3.0), 2.0
    )


def test_error_of_a_check_is_a_failure_and_the_next_one_runs():
    shown = []
    results = run_checks(
        [('bad', lambda ranks: 1 / 0), ('good', lambda ranks: ('fine', {}))],
        Ranks.here(),
        patience=60,
        show=shown.append,
        give_up=lambda results: None,
    )
    assert shown == results
    assert [result.status for result in results] == [FAILED, PASSED]
    assert results[0].sentence.startswith('ZeroDivisionError: division by')
    assert 'test_check_setup.py' in results[0].traceback


@pytest.mark.host
def test_command_passes_here(tmp_path):
    output = run('python', 'tools/check_setup.py', '--work-dir', tmp_path)
    file = tmp_path / 'check_setup.json'
    report = json.loads(file.read_text())
    assert report['passed'] is True
    assert report['versions']['torch'] == torch.__version__
    status = {result['name']: result['status'] for result in report['results']}
    assert [*status] == [name for name, _ in checklist(tmp_path)]
    lacking = {'all-reduce between nodes', 'SyncBN'}
    for name, state in status.items():
        assert state == (NOT_APPLICABLE if name in lacking else PASSED), name
    for result in report['results']:
        assert result['sentence'] in output
    assert '15 passed, 0 failed, 2 not applicable' in output


def test_rank_that_fails_ends_all_with_a_table(tmp_path):
    """The other one hangs in a collective, and later results are unknown."""
    port = free_port()
    output = run(
        *('python', 'tools/dist_run.py', '--nnodes=1', '--node_rank=0'),
        *('--master_addr=127.0.0.1', f'--master_port={port}'),
        *('--nproc_per_node=2', 'tests/broken_setup.py'),
        *('--launcher=pytorch', '--timeout=8', '--work-dir', tmp_path),
        code=1,
        PORT=port,
    )
    report = json.loads((tmp_path / 'check_setup.json').read_text())
    assert report['passed'] is False
    results = {result['name']: result for result in report['results']}
    assert results['all-reduce within a node']['status'] == PASSED
    broken = results['phi of split, fp32']
    assert broken['status'] == FAILED
    assert broken['sentence'].startswith('rank 1: RuntimeError: out of memory')
    assert broken['sentence'] in output
    assert results['resuming']['status'] == NOT_APPLICABLE
    assert 'since "phi of split, fp32"' in results['resuming']['sentence']


def test_timeout_of_no_time_is_refused():
    output = run('python', 'tools/check_setup.py', '--timeout', '0', code=1)
    assert '--timeout 0: each check' in output
    assert 'Traceback' not in output


def test_launcher_without_gpus_tells_its_usage():
    output = run('bash', 'tools/dist_check.sh', code=2)
    assert 'Usage: tools/dist_check.sh GPUS' in output
