"""Data-parallel ranks over gloo against the oracle and against plain DDP."""

import pytest
import torch
from oracle import Oracle
from rank_trainings import (
    DISTURBED,
    DROP,
    FACTOR,
    FAULTS,
    FLAVOURS,
    OWN_SCENARIOS,
    PRECONDITIONED,
    SCENARIOS,
    TINY,
    UPDATES,
    run_all,
    settings_of,
    unfreeze_rank,
)
from ranks import run_ranks
from test_matrix_optimizers import UPDATES as SHARED_UPDATES
from test_matrix_optimizers import trained
from test_preconditioner import check
from toy import MODULES, make_batch, make_model

import mmagvm  # noqa: F401

RANKS = (2, 3, 4)


@pytest.fixture(scope='module', params=RANKS, ids=lambda n: f'{n}ranks')
def results(request):
    return run_ranks(request.param, run_all)


@pytest.mark.parametrize('scenario', SCENARIOS + OWN_SCENARIOS, ids=str)
def test_ranks_equal_the_oracle(results, scenario):
    estimator, optimizer, accumulation, idle_head, *own_rules = scenario
    model = make_model(idle_head=idle_head)
    settings = settings_of(estimator, optimizer, *own_rules)
    oracle = Oracle(
        model,
        make_batch,
        ranks=len(results),
        accumulation=accumulation,
        optimizer=optimizer,
        **settings,
    )
    for update in range(UPDATES):
        if own_rules and update == DROP:
            oracle.lr_factor = FACTOR
        oracle.update()
    for result in (ranks[scenario] for ranks in results):
        assert result['world_size'] == len(results)
        # `pairs` waits for AdamW's second moment
        waits = estimator == 'pairs' and optimizer == 'AdamW'
        expected = 5 if own_rules else 2 if waits else 3
        assert result['measured'] == expected
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
    for scenario in SCENARIOS + OWN_SCENARIOS:
        first = results[0][scenario]
        for other in (ranks[scenario] for ranks in results[1:]):
            assert other['lr_scale'] == first['lr_scale']
            for name, weight in first['weights'].items():
                assert torch.equal(other['weights'][name], weight)


@pytest.mark.parametrize(
    'flavour', range(len(FLAVOURS)), ids=FLAVOURS.__getitem__
)
def test_measuring_alone_changes_no_bit_of_training(results, flavour):
    (plain, _), *measured = results[0]['flavours'][flavour]
    usual = [variance for _, variance in results[0]['flavours'][0][1:]]
    for (weights, variance), expected in zip(measured, usual):
        for name, weight in plain.items():
            assert torch.equal(weights[name], weight), name
        # other rounding, or another sum, in half precision
        tolerance = 0.05 if 'hook' in FLAVOURS[flavour] else 1e-3
        assert variance == pytest.approx(expected, abs=tolerance)


def test_only_a_measured_update_sends_more(results):
    sent, numel = results[0]['collectives', 'split']
    extra = numel + 4 * len(MODULES)  # beside what DDP sends
    assert sent == [extra, 0, 0, extra]
    sent, numel = results[0]['collectives', 'pairs']
    extra = 2 * len(MODULES)
    assert sent == [extra, 0, 0, extra]


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
@pytest.mark.parametrize('fault', FAULTS)
def test_fault_leaves_every_rank_as_it_was(results, estimator, fault):
    for before, after, skipped in (r[fault, estimator] for r in results):
        assert after == before
        assert skipped == 1


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_module_of_zero_gradient_keeps_its_multiplier(results, estimator):
    for before, after, measured in (r['zero', estimator] for r in results):
        assert measured == 4
        assert after['rpn_head'] == before['rpn_head']
        assert after['neck'] != before['neck']


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_compressed_gradients_are_measured_too(results, estimator):
    comm_hook = 'fp16'
    exact, _ = results[0][None, estimator]
    for variance, weights in (r[comm_hook, estimator] for r in results):
        assert variance != exact
        assert variance == pytest.approx(exact, abs=0.02)
        for name, weight in results[0][comm_hook, estimator][1].items():
            assert torch.equal(weights[name], weight)


@pytest.mark.parametrize('case', DISTURBED, ids=str)
def test_multipliers_agree_where_one_rank_rounds_otherwise(results, case):
    if len(results) == 4:
        pytest.skip('2 and 3 ranks are enough')
    first, *others = (ranks[('disturbed', *case)] for ranks in results)
    for other in others:
        assert repr(other) == repr(first)
    *_, factor = case
    if factor < 1.1:
        assert min(first[0].values()) < 0.95 or max(first[0].values()) > 1.05


@pytest.mark.parametrize('case', TINY, ids=str)
def test_gradients_that_vanish_in_float16_are_reported(results, case):
    if len(results) > 2:
        pytest.skip('2 ranks are enough')
    *case, warned = case
    for warnings, history in (ranks['tiny', tuple(case)] for ranks in results):
        about = [text for text in warnings if 'float16' in text]
        assert len(about) == warned
        if warned:  # once, and what to do
            assert "set comm_hook='bf16' (with NCCL) or None" in about[0]
            assert history


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_own_backward_passes_are_measured_alike(results, estimator):
    if len(results) > 2:
        pytest.skip('2 ranks are enough')
    own, usual = results[0]['own', estimator]
    assert own == usual and len(own) == 3


def test_resumed_training_equals_uninterrupted(results):
    for (weights, lr_scale), (resumed, resumed_scale) in results[0]['resumed']:
        assert resumed_scale == lr_scale
        for name, weight in weights.items():
            assert torch.equal(resumed[name], weight), name


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_update_that_the_scaler_skips_is_none_on_any_rank(results, estimator):
    first, *others = (ranks['skipped', estimator] for ranks in results)
    assert first['update'] == 4
    assert first['measured'] == [0, 2]
    assert first['skipped'] == 1
    for other in others:
        assert other['lr_scale'] == first['lr_scale']
        assert other['measured'] == first['measured']
        for name, weight in first['weights'].items():
            assert weight.isfinite().all()
            assert torch.equal(other['weights'][name], weight)


@pytest.mark.parametrize('scenario', PRECONDITIONED, ids=str)
def test_phi_is_in_the_optimizers_metric(results, scenario):
    first, *others = (ranks[scenario] for ranks in results)
    check(first, *scenario)
    for other in others:
        assert [phis for _, phis, _ in other] == [phis for _, phis, _ in first]


def test_ranks_share_the_work_of_optimizers_and_lose_no_bit(results):
    shared = [ranks['shared'] for ranks in results]
    # each job once, by any rank
    assert sorted(sum((done for (done, _, _), *_ in shared), [])) == [
        0,
        1,
        2,
    ]
    for (_, found, nothing), _, reductions, _ in shared:
        assert nothing == []
        assert reductions == SHARED_UPDATES  # one for all matrices
        for job, (first, second) in enumerate(found):
            assert torch.equal(first, torch.full((job + 1, 2), float(job)))
            assert torch.equal(second, torch.full((3,), float(-job)))
    for name, options in (
        ('SOAP', dict(precondition_frequency=3)),
        ('Muon', {}),
    ):
        alone = trained(name, **options)[0].state_dict()
        for _, nets, _, _ in shared:
            for key, weight in nets[name].items():
                assert torch.equal(weight, shared[0][1][name][key]), key
                # Muon's round otherwise alone: one matrix, or several at once
                exact = dict(rtol=0, atol=0) if name == 'SOAP' else {}
                torch.testing.assert_close(
                    weight, alone[key], **exact or dict(rtol=1e-4, atol=1e-5)
                )


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_layer_that_ranks_do_not_average_is_reported(estimator):
    for lines, measured, _, missed, _, hooks in run_ranks(
        2, unfreeze_rank, estimator, False
    ):
        (line,) = lines
        assert 'backbone.0.weight (and 1 more)' in line
        assert 'wrap the model again' in line
        assert measured == 3  # those before
        assert list(missed.values()) == [3]
        assert hooks == 0


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_model_wrapped_again_is_measured_on_all_ranks(estimator):
    first, second = run_ranks(2, unfreeze_rank, estimator, True)
    assert first[0] == second[0] == []
    assert first[1] == second[1] == 6
    assert first[2] == second[2]
    fresh = make_model().backbone[0].weight
    assert not torch.equal(first[4]['backbone.0.weight'], fresh)
    for name, weight in first[4].items():
        assert torch.equal(second[4][name], weight)


def test_ranks_with_weights_of_their_own_are_reported(results):
    shared = [ranks['shared'] for ranks in results]
    for name in ('SOAP', 'Muon'):
        for *_, apart in shared:
            assert 'share_work=False' in apart[name, True]
        first, *others = (apart[name, False] for *_, apart in shared)
        for other in others:
            assert isinstance(other, list)
            assert other != first
