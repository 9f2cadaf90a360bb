"""Data-parallel ranks over gloo against the oracle and against plain DDP."""

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from oracle import Oracle
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from toy import MODULES, make_batch, make_model, train, wrapper_cfg

import mmagvm  # noqa: F401

UPDATES = 6
SETTINGS = dict(interval=2, ema_decay=0.5, begin=1)
#: optimizer, accumulation, does a head idle on some ranks
SCENARIOS = [
    ('SGD', 1, False),
    ('AdamW', 1, False),
    ('SGD', 2, False),
    ('AdamW', 3, False),
    ('SGD', 1, True),
    ('AdamW', 2, True),
]
RANKS = (2, 3, 4)


def parallel(model, **kwargs):
    # buckets of a few parameters: several of them, rebuilt after one backward
    return DistributedDataParallel(model, bucket_cap_mb=2e-4, **kwargs)


def train_rank(rank, world_size, optimizer, accumulation, idle_head):
    model = make_model(idle_head=idle_head)
    # AdamW from the very first update, when it has no state yet
    settings = dict(SETTINGS, begin=0) if optimizer == 'AdamW' else SETTINGS
    wrapper = build_optim_wrapper(
        model,
        wrapper_cfg(optimizer, accumulative_counts=accumulation, **settings),
    )
    ddp = parallel(model, find_unused_parameters=idle_head)
    train(ddp, wrapper, UPDATES, rank, accumulation)
    return dict(
        weights=model.state_dict(),
        variance=wrapper.modulator.variance,
        lr_scale=wrapper.modulator.lr_scale,
        history=wrapper.modulator.history,
        measured=wrapper.modulator.measured,
        world_size=wrapper.world_size,
    )


def train_plain_and_measured(rank, world_size, gradient_as_bucket_view):
    """Weights under plain DDP, and with measuring that modulates nothing."""
    weights = []
    for settings in (None, dict(interval=2, ratio_range=(1, 1))):
        model = make_model().float()
        cfg = wrapper_cfg() if settings is None else wrapper_cfg(**settings)
        if settings is None:
            cfg.update(
                type='OptimWrapper',
                constructor='DefaultOptimWrapperConstructor',
            )
        wrapper = build_optim_wrapper(model, cfg)
        ddp = parallel(model, gradient_as_bucket_view=gradient_as_bucket_view)
        for update in range(UPDATES):
            with wrapper.optim_context(ddp):
                loss = ddp(make_batch(update, rank, 0).float())
            wrapper.update_params(loss)
        weights.append(model.state_dict())
    assert wrapper.modulator.measured == 3
    return weights


def count_collectives(rank, world_size):
    """Elements all-reduced in each update, measured or not."""
    import torch.distributed as dist

    all_reduce, sent = dist.all_reduce, []

    def counting(tensor, *args, **kwargs):
        sent[-1] += tensor.numel()
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        model = make_model()
        wrapper = build_optim_wrapper(model, wrapper_cfg(interval=3))
        ddp = parallel(model)
        for update in range(4):
            sent.append(0)
            train(ddp, wrapper, update + 1, rank, start=update)
    finally:
        dist.all_reduce = all_reduce
    return sent, sum(p.numel() for p in model.parameters())


def refuse_second_hook(rank, world_size):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
        allreduce_hook,
    )

    model = make_model()
    wrapper = build_optim_wrapper(model, wrapper_cfg())
    ddp = parallel(model)
    ddp.register_comm_hook(None, allreduce_hook)
    with pytest.raises(ValueError, match='register_comm_hook'):
        train(ddp, wrapper, 1, rank)
    with pytest.raises(ValueError, match='2 ranks the model is a ToyDetector'):
        train(model, build_optim_wrapper(model, wrapper_cfg()), 1, rank)


def train_nan(rank, world_size):
    """A NaN on one rank: every rank must keep its lr_scale."""
    model = make_model()
    wrapper = build_optim_wrapper(model, wrapper_cfg(interval=1))
    ddp = parallel(model)
    train(ddp, wrapper, 2, rank)
    before = dict(wrapper.modulator.lr_scale), dict(wrapper.modulator.variance)
    with wrapper.optim_context(ddp):
        loss = ddp(make_batch(2, rank, 0))
    wrapper.update_params(loss * (float('nan') if rank == 1 else 1))
    return (
        before,
        (wrapper.modulator.lr_scale, wrapper.modulator.variance),
        wrapper.modulator.skipped,
    )


def train_resumed(rank, world_size, optimizer):
    """Weights and lr_scale of an uninterrupted and of a resumed training.

    DDP rebuilds its buckets after the first backward of a process, and from
    3 ranks on gloo sums an element in an order that depends on its place, so
    that even plain training rounds otherwise after a restart. With
    find_unused_parameters DDP never rebuilds.
    """
    kwargs = dict(find_unused_parameters=world_size > 2)
    results = []
    for stops in ([UPDATES], [UPDATES // 2, UPDATES]):
        saved, start = None, 0
        for stop in stops:
            model = make_model()
            wrapper = build_optim_wrapper(
                model, wrapper_cfg(optimizer, interval=1, ema_decay=0.5)
            )
            if saved is not None:
                model.load_state_dict(saved[0])
                wrapper.load_state_dict(saved[1])
            ddp = parallel(model, **kwargs)
            train(ddp, wrapper, stop, rank, start=start)
            saved, start = (model.state_dict(), wrapper.state_dict()), stop
        results.append((model.state_dict(), wrapper.modulator.lr_scale))
    return results


def run_all(rank, world_size):
    """Everything of this file in one launch, which is most of its time."""
    results = {
        scenario: train_rank(rank, world_size, *scenario)
        for scenario in SCENARIOS
    }
    results['plain'] = [
        train_plain_and_measured(rank, world_size, view)
        for view in (False, True)
    ]
    results['collectives'] = count_collectives(rank, world_size)
    results['nan'] = train_nan(rank, world_size)
    results['resumed'] = [
        train_resumed(rank, world_size, optimizer)
        for optimizer in ('SGD', 'AdamW')
    ]
    if world_size == 2:
        refuse_second_hook(rank, world_size)
    return results


@pytest.fixture(scope='module', params=RANKS, ids=lambda n: f'{n}ranks')
def results(request):
    return run_ranks(request.param, run_all)


@pytest.mark.parametrize('scenario', SCENARIOS, ids=str)
def test_ranks_equal_the_oracle(results, scenario):
    optimizer, accumulation, idle_head = scenario
    model = make_model(idle_head=idle_head)
    settings = dict(SETTINGS, begin=0) if optimizer == 'AdamW' else SETTINGS
    oracle = Oracle(
        model,
        make_batch,
        ranks=len(results),
        accumulation=accumulation,
        optimizer=optimizer,
        **settings,
    )
    for _ in range(UPDATES):
        oracle.update()
    for result in (ranks[scenario] for ranks in results):
        assert result['world_size'] == len(results)
        assert result['measured'] == 3
        assert set(result['lr_scale']) == set(MODULES)
        assert result['lr_scale'] == pytest.approx(oracle.mu, rel=1e-9)
        assert max(abs(mu - 1) for mu in oracle.mu.values()) > 0.05
        for module, phi in oracle.phi.items():
            assert result['variance'][module] == pytest.approx(phi, abs=1e-9)
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(
                result['weights'][name], weight, rtol=1e-9, atol=1e-11
            )


def test_all_ranks_agree_bit_for_bit(results):
    for scenario in SCENARIOS:
        first = results[0][scenario]
        for other in (ranks[scenario] for ranks in results[1:]):
            assert other['lr_scale'] == first['lr_scale']
            for name, weight in first['weights'].items():
                assert torch.equal(other['weights'][name], weight)


def test_measuring_alone_changes_no_bit_of_training(results):
    for plain, measured in results[0]['plain']:
        for name, weight in plain.items():
            assert torch.equal(measured[name], weight), name


def test_only_a_measured_update_sends_more(results):
    sent, numel = results[0]['collectives']
    assert sent == [2 * numel, numel, numel, 2 * numel]


def test_nan_on_one_rank_leaves_every_rank_as_it_was(results):
    for before, after, skipped in (ranks['nan'] for ranks in results):
        assert after == before
        assert skipped == 1


def test_resumed_training_equals_uninterrupted(results):
    for (weights, lr_scale), (resumed, resumed_scale) in results[0]['resumed']:
        assert resumed_scale == lr_scale
        for name, weight in weights.items():
            assert torch.equal(resumed[name], weight), name
