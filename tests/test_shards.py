"""phi over FSDP2's shards, against data-parallel training and the oracle."""

import pytest
import torch
from oracle import Oracle
from ranks import run_ranks
from sharded import train, wrapped
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from toy import MODULES, make_batch, make_model

from mmagvm.core import AGVM, Settings, module_groups

#: A head that one rank uses and the other does not, in turn. (Where neither
#: does, data-parallel training has no gradient, and shards have zeros.)
IDLE = dict(idle_head=True, find_unused=True, stream=(0, 5, 0, 5))
#: How phi is measured, on how many ranks.
CASES = {
    'pairs SGD': (2, dict()),
    'pairs SGD on 4': (4, dict()),
    'pairs SGD, one unit': (2, dict(units=())),
    'pairs AdamW': (2, dict(kind='AdamW')),
    'pairs AdamW on 4': (4, dict(kind='AdamW')),
    'split SGD': (2, dict(estimator='split')),
    'split AdamW on 4': (4, dict(estimator='split', kind='AdamW')),
    'pairs SGD, clipped': (2, dict(max_norm=0.5)),
    'split AdamW, clipped': (
        2,
        dict(estimator='split', kind='AdamW', max_norm=0.5),
    ),
    'pairs SGD, scaled': (2, dict(loss_scale=1024.0)),
    'pairs AdamW, scaled': (2, dict(kind='AdamW', loss_scale=1024.0)),
    'split AdamW, scaled': (
        2,
        dict(estimator='split', kind='AdamW', loss_scale=1024.0),
    ),
    'pairs AdamW, frozen': (2, dict(kind='AdamW', frozen=('backbone.0',))),
    'split SGD, frozen': (
        2,
        dict(estimator='split', frozen=('backbone.0', 'rpn_head')),
    ),
    'pairs SGD, idle on one': (2, IDLE),
    'pairs AdamW, a unit twice': (2, dict(kind='AdamW', neck_twice=True)),
    'split AdamW, idle on one': (
        2,
        dict(IDLE, estimator='split', kind='AdamW'),
    ),
    **{
        f'{estimator} {kind}, {replicas} replicas': (
            4,
            dict(estimator=estimator, kind=kind, replicas=replicas),
        )
        for estimator in ('pairs', 'split')
        for kind in ('SGD', 'AdamW')
        for replicas in (2,)
    },
}
#: Of two ranks with two micro-batches each, every one a sample.
ACCUMULATED = {
    f'{estimator} {kind}': dict(estimator=estimator, kind=kind)
    for estimator in ('pairs', 'split')
    for kind in ('SGD', 'AdamW')
}
ONLY_SHARDED = ('units', 'replicas')


def on_ranks(rank, world_size):
    """Every case of so many ranks, sharded and data-parallel."""
    found = {}
    for name, (ranks, options) in CASES.items():
        if ranks == world_size:
            plain = {
                key: value
                for key, value in options.items()
                if key not in ONLY_SHARDED
            }
            found[name] = (
                train(rank, True, **options),
                train(rank, False, **plain),
            )
    for name, options in ACCUMULATED.items():
        found[f'accumulated {name}'] = (
            train(rank, True, accumulation=2, **options)
            if world_size == 2
            else train(rank, False, sharded_ranks=2, **options)
        )
    if world_size == 2:
        found['bf16'] = train(rank, True, bf16=True)
        found['poisoned'] = train(rank, True, poison=(1, 2))
        for estimator in ('pairs', 'split'):
            for kind in ('SGD', 'AdamW'):
                options = dict(estimator=estimator, kind=kind, max_norm=0.5)
                never = dict(begin=10**6)
                measured = dict(modulate=False)
                found[f'unchanged {estimator} {kind}'] = [
                    train(rank, True, settings=settings, **options)
                    for settings in (never, measured)
                ]
        found['plain'] = train(rank, True, with_agvm=False)
        found['never'] = train(rank, True, settings=dict(begin=10**6))
        found['refused'] = refusals()
        found['divided'] = divided(rank)
        found['thawed'] = [thawed(rank, frozen) for frozen in (True, False)]
    return found


def refused(model, **options):
    """The message with which AGVM refuses a sharded model."""
    optimizer = torch.optim.SGD(module_groups(model), lr=0.1)
    with pytest.raises(ValueError) as error:
        AGVM(optimizer, model, Settings(**options))
    return str(error.value)


def refusals():
    """The error message of each wrong setting."""
    mesh = init_device_mesh('cpu', (2,))
    messages = {}
    parts = make_model().float()
    fully_shard(parts.neck, mesh=mesh)
    messages['a part'] = refused(parts)
    messages['comm_hook'] = refused(
        wrapped(make_model(), True), comm_hook='bf16'
    )
    model = make_model().float()
    fully_shard(model, mesh=mesh, ignored_params={model.scale})
    messages['ignored'] = refused(model)
    model = make_model().float()
    model.backbone[2] = torch.nn.Linear(9, 8)
    model.neck = torch.nn.Linear(8, 6)
    model.backbone[0] = torch.nn.Linear(6, 9)
    fully_shard(
        model.neck, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1)
    )
    fully_shard(model, mesh=mesh)
    messages['dimension'] = refused(model)
    messages['alone'] = refused(wrapped(make_model(), True, replicas=2))
    return messages


def divided(rank):
    """Where torch divides gradients before they are reduced, as in float16."""
    model = make_model().double()
    outer = wrapped(model, True)
    optimizer = torch.optim.SGD(module_groups(model), lr=0.1)
    agvm = AGVM(optimizer, outer, Settings(interval=1))
    for update in range(2):
        with agvm.micro_batch():
            outer(make_batch(update, rank, 0)).backward()
        agvm.step()
        optimizer.zero_grad()
    return agvm.modulator.measured, agvm.why_missed()


def thawed(rank, frozen):
    """A layer that is frozen or unfrozen during training."""
    model = make_model().float()
    model.backbone[0].requires_grad_(not frozen)
    outer = wrapped(model, True)
    optimizer = torch.optim.SGD(module_groups(model), lr=0.1)
    agvm = AGVM(optimizer, outer, Settings(interval=1))
    trained = []
    for update in range(4):
        model.backbone[0].requires_grad_((update < 2) != frozen)
        with agvm.micro_batch():
            outer(make_batch(update, rank, 0).float()).backward()
        trained.append(model.backbone[0].weight.grad is not None)
        agvm.step()
        optimizer.zero_grad()
    return trained, agvm.modulator.measured


@pytest.fixture(scope='module')
def found():
    """The results of each rank, by number of ranks."""
    return {ranks: run_ranks(ranks, on_ranks) for ranks in (2, 4)}


def assert_same(ours, other, tolerance=1e-5):
    assert len(ours['history']) == len(other['history']) > 0
    for (update, phis), (its_update, its_phis) in zip(
        ours['history'], other['history']
    ):
        assert update == its_update
        assert phis == pytest.approx(its_phis, abs=tolerance, nan_ok=True)
    assert ours['lr_scale'] == pytest.approx(other['lr_scale'], rel=1e-4)
    for name, weight in ours['weights'].items():
        torch.testing.assert_close(
            weight, other['weights'][name], rtol=0, atol=1e-4
        )


@pytest.mark.parametrize('name', CASES)
def test_phi_is_that_of_data_parallel_training(found, name):
    ranks = CASES[name][0]
    for rank in range(ranks):
        ours, other = found[ranks][rank][name]
        assert_same(ours, other)
        # the same bits on all ranks
        assert ours['lr_scale'] == found[ranks][0][name][0]['lr_scale']


@pytest.mark.parametrize('name', ACCUMULATED)
def test_every_micro_batch_of_a_rank_is_a_sample(found, name):
    """Like more ranks with one micro-batch each."""
    ours = found[2][0][f'accumulated {name}']
    other = found[4][0][f'accumulated {name}']
    assert_same(ours, other)
    assert ours['noise_scale'] == pytest.approx(other['noise_scale'], rel=1e-3)


@pytest.mark.parametrize('estimator', ['pairs', 'split'])
@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_phi_is_the_oracles(found, estimator, optimizer):
    """Of two ranks with two micro-batches, as four ranks of the oracle."""
    oracle = Oracle(
        make_model(),
        lambda t, rank, _: make_batch(t, rank % 2, rank // 2),
        ranks=4,
        optimizer=optimizer,
        interval=1,
        ema_decay=0.5,
        estimator=estimator,
    )
    for _ in range(4):
        oracle.update()
    ours = found[2][0][f'accumulated {estimator} {optimizer}']
    assert dict(zip(MODULES, ours['history'][-1][1])) == pytest.approx(
        oracle.phi, abs=2e-4
    )
    assert ours['lr_scale'] == pytest.approx(oracle.mu, abs=2e-4)


@pytest.mark.parametrize('estimator', ['pairs', 'split'])
@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_measuring_changes_no_bit(found, estimator, optimizer):
    never, measured = found[2][0][f'unchanged {estimator} {optimizer}']
    assert measured['history'] and not never['history']
    for name, weight in never['weights'].items():
        assert torch.equal(weight, measured['weights'][name]), name


def test_agvm_that_never_measures_is_plain_training(found):
    plain, never = found[2][0]['plain'], found[2][0]['never']
    for name, weight in plain['weights'].items():
        assert torch.equal(weight, never['weights'][name]), name


def test_bf16_parameters_and_fp32_reduction(found):
    """Training itself differs, so phi is only close to that in fp32."""
    ours, exact = found[2][0]['bf16'], found[2][0]['pairs SGD'][0]
    assert ours['history'][0][1] == pytest.approx(
        exact['history'][0][1], abs=0.05
    )
    assert ours['history'][0][1] != exact['history'][0][1]


def test_nan_on_one_rank_changes_no_multiplier_of_any(found):
    first, second = (found[2][rank]['poisoned'] for rank in (0, 1))
    # update 2 is not finite, and so is all that follows from its step
    assert [update for update, _ in first['history']] == [0, 1]
    assert first['lr_scale'] == second['lr_scale']


def test_refusals_say_what_to_do(found):
    messages = found[2][0]['refused']
    assert 'on which fully_shard was not called' in messages['a part']
    assert "comm_hook='bf16'" in messages['comm_hook']
    assert 'mixed_precision.reduce_dtype' in messages['comm_hook']
    assert 'scale is not sharded' in messages['ignored']
    assert 'shards of the first dimension' in messages['dimension']
    assert 'shard it over 2 or more' in messages['alone']
    for message in messages.values():
        assert 'FullyShardStrategy' in message


def test_gradients_that_are_divided_otherwise_are_not_measured(found):
    measured, why = found[2][0]['divided']
    assert measured == 0
    assert 'sent as torch.float64' in why
    assert '(2 times)' in why


@pytest.mark.parametrize('frozen', [True, False])
def test_layers_may_be_frozen_and_unfrozen_in_mid_training(found, frozen):
    """Shards average all trained parameters, also those unfrozen later."""
    trained, measured = found[2][0]['thawed'][0 if frozen else 1]
    assert trained == [not frozen] * 2 + [frozen] * 2
    assert measured == 4
