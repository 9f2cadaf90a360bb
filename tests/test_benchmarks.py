"""The pieces of tools/benchmarks on tiny inputs; no time is asserted."""

import pytest
import torch
import torch.distributed as dist
from benchmarks import estimator_error, optimizer_cost, step_cost
from benchmarks.counters import CollectiveBytes, HostReads, Profile
from benchmarks.published_pattern import PublishedPattern, modules_of
from mmengine.optim import build_optim_wrapper
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from toy import MODULES, make_batch, make_model, train, wrapper_cfg

from mmagvm.analysis import markdown, statistics
from mmagvm.core.functional import (
    half_batch_norms,
    pairs_variance,
    split_variance,
)

NAMES = [name for name in MODULES if name != 'others']
ESTIMATORS = ('split', 'pairs')


def build(variant):
    """A wrapper and the model that it trains, in a variant."""
    model = make_model()
    plain = build_optim_wrapper(
        model, dict(optimizer=wrapper_cfg()['optimizer'])
    )
    if variant == 'published':
        modules = dict(modules_of(model, NAMES), others=[model.scale])
        wrapper = PublishedPattern(modules, 2, optimizer=plain.optimizer)
        return wrapper, model, model
    if variant in ESTIMATORS:
        plain = build_optim_wrapper(
            model, wrapper_cfg(interval=2, estimator=variant)
        )
    return plain, DistributedDataParallel(model), model


def count_updates(rank, variant):
    """Bytes, profiled elements and reads of updates 2 and 3."""
    wrapper, model, _ = build(variant)
    # before its second update DDP sends its new buckets to the ranks
    train(model, wrapper, 2, rank)
    counts = []
    for number in (2, 3):
        with CollectiveBytes() as sent, Profile() as seen:
            with wrapper.optim_context(model):
                loss = model(make_batch(number, rank, 0))
            with HostReads() as reads:
                wrapper.update_params(loss)
        counts.append((sent.bytes, seen.elements, len(reads.reads)))
        assert seen.peak_bytes > 0
    return counts


def train_published(rank):
    """Weights of the pattern and of plain training, and the halves' phi."""
    wrapper, model, module = build('published')
    # the first update is measured: its halves are the two ranks
    loss = model(make_batch(0, rank, 0))
    grads = torch.autograd.grad(loss, list(module.parameters()))
    local = dict(zip(module.parameters(), grads))
    flat = {
        name: torch.cat([local[p].flatten() for p in params])
        for name, params in wrapper.modules.items()
    }
    train(model, wrapper, 1, rank)
    variance = dict(wrapper.variance)
    train(model, wrapper, 3, rank, start=1)
    plain, ddp, reference = build('plain')
    train(ddp, plain, 3, rank)
    return dict(
        weights=module.state_dict(),
        plain=reference.state_dict(),
        flat=flat,
        variance=variance,
    )


def hidden_read(rank):
    """Reads that happen in a communication hook, inside of backward."""
    ddp = DistributedDataParallel(make_model())

    def hook(state, bucket):
        bucket.buffer().sum().item()
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, hook)
    loss = ddp(make_batch(0, rank, 0))
    with HostReads() as reads:
        loss.backward()
    return reads.reads


def run_all(rank, world_size):
    results = {
        variant: count_updates(rank, variant)
        for variant in ('plain', *ESTIMATORS, 'published')
    }
    results['training'] = train_published(rank)
    results['hidden'] = hidden_read(rank)
    return results


@pytest.fixture(scope='module')
def ranks():
    return run_ranks(2, run_all)


@pytest.fixture(scope='module')
def result(ranks):
    return ranks[0]


def test_published_pattern_averages_gradients_as_plain_training(ranks):
    for found in (rank['training'] for rank in ranks):
        for name, weight in found['plain'].items():
            torch.testing.assert_close(found['weights'][name], weight)


def test_published_pattern_compares_the_halves(ranks):
    first, second = (rank['training'] for rank in ranks)
    assert first['variance'] == second['variance']
    for name in MODULES:
        cosine = torch.cosine_similarity(
            first['flat'][name], second['flat'][name], dim=0
        )
        assert first['variance'][name] == pytest.approx(1 - float(cosine))


def test_bytes_are_counted_exactly(result):
    numel = sum(p.numel() for p in make_model().parameters())
    h, double = len(MODULES), 8

    def counts(variant):
        # the first of two updates is measured
        return [c[:2] for c in result[variant]]

    # DDP's own reducer calls no collective from Python
    assert counts('plain') == [(0, numel), (0, numel)]
    extra = numel + 4 * h
    assert counts('split') == [(double * extra, numel + extra), (0, numel)]
    assert counts('pairs') == [(double * 2 * h, numel + 2 * h), (0, numel)]
    # two passes over all parameters, the gather and the outcome's broadcast
    sent = 3 * numel + h
    assert counts('published') == [
        (double * sent, sent),
        (double * numel, numel),
    ]


def test_reads_are_those_of_a_measured_update(result):
    def reads(variant):
        return [c[2] for c in result[variant]]

    assert reads('plain') == [0, 0]
    assert reads('split') == [1, 0]
    assert reads('pairs') == [1, 0]


def test_reads_in_a_communication_hook_are_seen(result):
    assert result['hidden'] == ['item']


def test_only_reads_of_what_is_on_the_device_count():
    gradient = torch.ones(3)
    with HostReads() as reads:
        kept = (gradient * 2).cpu()
        assert kept.sum().item() == 6 and kept.tolist() == [2, 2, 2]
        assert torch.tensor([1.0]).item() == 1
        assert (kept + gradient).sum() > 0
        assert torch.zeros(1, device=gradient.device).item() == 0
    assert reads.reads == ['cpu', '__bool__', 'item']


def test_collectives_are_put_back():
    before = dist.all_reduce
    with CollectiveBytes():
        assert dist.all_reduce is not before
    assert dist.all_reduce is before


def test_peak_memory_of_known_tensors():
    held = torch.ones(1)
    with Profile() as seen:
        first = held.expand(50_000).clone()
        del first
        held.expand(100_000).clone()
    assert 400_000 <= seen.peak_bytes < 500_000


@pytest.fixture(scope='module')
def gaussian():
    """Gradients with a known true one: (400, 2000), noise 4 x signal."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(2000, generator=generator)
    noise = torch.randn(400, 2000, generator=generator)
    return true, true + 2 * noise


def test_estimates_from_inner_products_are_those_of_the_core(gaussian):
    gradients = gaussian[1][:12]
    products = estimator_error.gram(gradients, chunk=700)
    draws = torch.tensor([[0, 3, 5, 7], [11, 2, 1, 6]])
    for estimator in ESTIMATORS:
        phis = estimator_error.estimate(products, draws, estimator)
        for phi, draw in zip(phis, draws):
            samples = gradients[draw].double()
            if estimator == 'pairs':
                direct = pairs_variance(
                    samples.square().sum(1).mean()[None],
                    samples.mean(0).square().sum()[None],
                    4,
                )
            else:
                g1, g2 = samples[::2].sum(0), samples[1::2].sum(0)
                norms = half_batch_norms([g1 + g2], [g1 - g2])
                direct = split_variance(norms[None])
            assert phi.item() == pytest.approx(direct.item(), rel=1e-9)


def test_pairs_spread_less_and_neither_is_biased(gaussian):
    true, gradients = gaussian
    products = dict(module=estimator_error.gram(gradients))
    rows = estimator_error.compare(products, [2, 8, 32], 600)
    signal, noise = true.square().sum().item(), 4.0 * 2000
    assert [row['ranks'] for row in rows] == [2, 8, 32]
    for row in rows:
        phi = 1 - signal / (signal + 2 * noise / row['ranks'])
        assert row['phi'] == pytest.approx(phi, rel=0.03)
        for estimator in ESTIMATORS:
            found = row[estimator]
            assert abs(found['bias']) < 0.02 * phi
            assert found['error'] == pytest.approx(
                (found['bias'] ** 2 + found['std'] ** 2) ** 0.5
            )
        if row['ranks'] > 2:
            assert row['pairs_wins']
            assert row['pairs']['std'] < 0.75 * row['split']['std']
    # with two ranks there is one pair, which is the split
    spreads = [rows[0][estimator]['std'] for estimator in ESTIMATORS]
    assert spreads[0] == pytest.approx(spreads[1], rel=0.05)
    assert 'better default' in estimator_error.verdict(rows)
    rows[1]['pairs_wins'] = False
    assert 'not for module at 8 ranks' in estimator_error.verdict(rows)


def test_plot_has_a_panel_for_each_module(gaussian):
    products = estimator_error.gram(gaussian[1][:40])
    rows = estimator_error.compare(
        dict(backbone=products, neck=2 * products), [2, 4], 20
    )
    figure = estimator_error.draw(dict(rows=rows, settings=dict(images=8)))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ['backbone', 'neck', '', '']


@pytest.mark.parametrize(
    ('n', 'left_out'), [(5, 0), (6, 0), (10, 1), (40, 13)]
)
def test_interval_of_the_median(n, left_out):
    # the exact binomial ones, as in tables of the sign test
    found = statistics.summary([float(i) for i in range(n)][::-1])
    assert found['median'] == (n - 1) / 2
    assert (found['low95'], found['high95']) == (left_out, n - 1 - left_out)


def test_ratios_are_taken_within_a_repetition():
    # the second repetition was disturbed, the ratio was not
    assert statistics.ratio_summary([2.0, 20.0], [1.0, 10.0])['median'] == 2


def test_tables_go_between_their_comments(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('A\n<!-- x: begin -->\nold\n<!-- x: end -->\nB\n')
    table = markdown.table(('a', 'b'), [('1', '22')])
    markdown.fill(page, 'x', table)
    assert page.read_text() == (
        'A\n<!-- x: begin -->\n| a   |   b |\n| --- | --- |\n| 1   |  22 |\n'
        '<!-- x: end -->\nB\n'
    )
    markdown.fill(page, 'y', 'new')
    assert page.read_text().endswith(
        'B\n<!-- y: begin -->\nnew\n<!-- y: end -->\n'
    )


@pytest.mark.parametrize(
    ('low', 'high', 'at_most', 'at_least', 'is_one'),
    [
        (0.99, 1.01, 'yes', 'NO', 'yes'),
        (0.99, 1.2, 'undecided', 'undecided', 'undecided'),
        (1.2, 1.3, 'NO', 'yes', 'NO'),
    ],
)
def test_noise_proves_nothing(low, high, at_most, at_least, is_one):
    stats = dict(median=(low + high) / 2, low95=low, high95=high)
    assert step_cost.compare_with(stats, 1.1, most=True) == at_most
    assert step_cost.compare_with(stats, 1.1, most=False) == at_least
    assert step_cost.compare_with_one(stats) == is_one


def made_up_rank(slower):
    """The result of a rank with known seconds."""
    seconds = dict(plain=[1.0, 2.0], pairs=[1.5, 3.0])
    counts = dict(
        wrapped_bytes=40,
        wrapped_elements=10,
        wrapped_calls=1,
        profiled_elements=12,
        reads=['cpu'],
        device_to_host=0,
        peak_bytes=7,
    )
    return dict(
        times={
            name: dict(
                measured=[(2 * slower * s, s) for s in values],
                unmeasured=[(slower * s, s) for s in values],
            )
            for name, values in seconds.items()
        },
        counts={
            name: dict(measured=dict(counts), unmeasured=dict(counts))
            for name in seconds
        },
        parameters=20,
        trainable=10,
        modules=['backbone'],
    )


def test_summary_is_of_the_slowest_rank():
    part = step_cost.summarise([made_up_rank(1), made_up_rank(3)])
    pairs = part['variants']['pairs']
    assert pairs['unmeasured']['seconds']['median'] == 3 * 2.25
    assert pairs['unmeasured']['ratio']['median'] == 1.5
    assert pairs['amortised_ratio']['10']['median'] == pytest.approx(1.5)
    # two elements that no wrapper saw, of 4 bytes
    assert pairs['measured']['bytes'] == 40 + 2 * 4
    results = dict(
        machine=dict(gpus=[], cpu='a CPU', cores=2),
        versions=dict(python='3.11'),
        settings=dict(
            repetitions=2, image_size=64, proposals=64, accumulation=1
        ),
        load_before=0.5,
        ranks={'2': part},
        optimizer_step=[],
    )
    results['claims'] = step_cost.judge(results)
    claims = {c['claim']: c['holds'] for c in results['claims']}
    assert claims['pairs, 2 ranks: amortised time at tau = 10'] == 'NO'
    assert claims['pairs, 2 ranks: bytes that a measured update adds'] == 'yes'
    row = (
        '| pairs, measured   | 13500 (11250 to 15750) | 1.500 (1.500 to 1.500)'
    )
    assert row in step_cost.tables(results)


def test_steps_of_optimizers_are_distinguished():
    pytest.importorskip('pytorch_optimizer')
    model = make_model().float()
    step = optimizer_cost.time_steps(
        model, optimizer_cost.OPTIMIZER_CONFIGS['SOAP'], 2
    )
    assert set(step) == {'first', 'usual', 'renewal', 'state'}
    # two moments, and for each matrix S and Q of both sides
    numbers = 0
    for param in model.parameters():
        numbers += 2 * param.numel()
        if param.dim() > 1:
            numbers += 2 * sum(size**2 for size in param.shape)
    assert step['state'] == 4 * numbers
    step.update(usual=2.0, renewal=12.0, first=30.0)
    found = dict(toy=dict(parameters=2e6, passes=4.0, steps=dict(SOAP=step)))
    (row,) = optimizer_cost.rows('1', found)
    # 2 s, and 10 more every fifth step, are half of 8 s
    assert row[0] == 'toy, 2 M' and row[-1] == '50 %'
