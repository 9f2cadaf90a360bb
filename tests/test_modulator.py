"""What this project adds to the paper's rule, by hand."""

import logging

import pytest
import torch

from mmagvm.core import AGVM, Settings
from mmagvm.core.grad_growth import GradGrowth
from mmagvm.core.grad_variance import Measurement
from mmagvm.core.lr_drop import LRDrop
from mmagvm.core.modulator import Modulator

NAN = float('nan')
ALL = torch.tensor([True])


def modulator(ema_decay=0.0, **options):
    """A backbone and the head that follows it."""
    return Modulator(
        ['backbone', 'head'],
        'backbone',
        ema_decay,
        0.0,
        (0.1, 10.0),
        **options,
    )


def measurement(backbone, head, norms=(1.0, 1.0)):
    """phi of both, and squared norms of their gradients."""
    return Measurement(
        torch.tensor([backbone, head], dtype=torch.float64),
        True,
        norm=torch.tensor(norms, dtype=torch.float64),
    )


# -- restart_at_lr_drop


def test_average_restarts_when_the_learning_rate_drops():
    rule, usual = modulator(0.75, restart_at_lr_drop=True), modulator(0.75)
    for each in (rule, usual):
        each.update(0, measurement(0.4, 0.1), lr=1.0)
    assert rule.lr_scale == usual.lr_scale  # 0.75 + 0.25 * 2
    # means of a 3 and of 1s; the fifth has 0.75 of the old value
    expected = [3.0, 2.0, 5 / 3, 1.5, 1.375]
    for update, (phi, value) in enumerate(
        zip([0.9, 0.1, 0.1, 0.1, 0.1], expected), 1
    ):
        rule.update(update, measurement(phi, 0.1), lr=0.1)
        assert rule.lr_scale['head'] == pytest.approx(value)


@pytest.mark.parametrize(
    'rates, drops',
    [
        ([0.1, 0.5, 1.0, 1.0], []),  # warm-up
        ([1.0, 0.51, 0.5], []),
        ([1.0, 0.1, 0.1, 0.01], [1, 3]),
        # a cosine falls bit by bit
        ([1.0, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.0, 0.0], [3, 5, 7]),
        ([1.0, 0.1, 1.0, 0.4], [1, 3]),  # it may rise again
    ],
)
def test_where_a_learning_rate_drops(rates, drops):
    lr_drop = LRDrop(['backbone'])
    decays = [lr_drop.ema_decay(0.9, rate, ALL) for rate in rates]
    assert [i for i, decay in enumerate(decays) if decay == 0] == drops
    assert lr_drop.drops == len(drops)


def test_drop_is_logged(caplog):
    lr_drop = LRDrop(['backbone'])
    with caplog.at_level(logging.INFO, 'mmagvm'):
        lr_drop.ema_decay(0.9, 0.02, ALL)
        assert not caplog.messages
        lr_drop.ema_decay(0.9, 0.002, ALL)
    (line,) = caplog.messages
    assert 'dropped from 0.02 to 0.002' in line


def test_update_that_is_not_measured_does_not_count():
    rule = modulator(0.75, restart_at_lr_drop=True, bound_by_grad_norm=True)
    rule.update(0, measurement(0.4, 0.1), lr=1.0)
    before = rule.state_dict()
    wrong = measurement(NAN, NAN, (NAN, NAN))._replace(finite=False)
    rule.update(1, wrong, lr=0.1)
    rule.update(2, measurement(NAN, 0.1, (0.0, 9.0)), lr=0.1)  # no anchor
    for name in ('lr_scale', 'restart_at_lr_drop', 'bound_by_grad_norm'):
        assert rule.state_dict()[name] == before[name]
    rule.update(3, measurement(0.9, 0.1), lr=0.1)
    assert rule.lr_scale['head'] == pytest.approx(3.0)


def test_learning_rates_in_tensors_are_refused():
    groups = [
        dict(params=[torch.nn.Parameter(torch.ones(1))], module=module)
        for module in ('backbone', 'head')
    ]
    optimizer = torch.optim.Adam(groups, lr=torch.tensor(0.1))
    AGVM(optimizer)
    with pytest.raises(ValueError, match='lr as a number, or set restart_at'):
        AGVM(optimizer, settings=Settings(restart_at_lr_drop=True))


def test_module_restarts_when_it_is_measured_again():
    rule = modulator(0.75, restart_at_lr_drop=True)
    rule.update(0, measurement(0.4, 0.1), lr=1.0)
    rule.update(1, measurement(0.4, NAN), lr=0.1)
    assert rule.lr_scale['head'] == pytest.approx(1.25)
    rule.update(2, measurement(0.9, 0.1), lr=0.1)
    assert rule.lr_scale['head'] == pytest.approx(3.0)


# -- bound_by_grad_norm


def test_ratio_of_a_growing_gradient_is_bounded():
    rule = modulator(bound_by_grad_norm=True)
    rule.update(0, measurement(0.4, 0.1))
    assert rule.lr_scale['head'] == pytest.approx(2.0)
    rule.ema_decay = 0.5
    # the head's square is 4, with an average of 2.5
    rule.update(1, measurement(0.4, 0.1, (1.0, 4.0)))
    expected = 0.5 * 2.0 + 0.5 * 2.0 / (4 / 2.5) ** 0.5
    assert rule.lr_scale['head'] == pytest.approx(expected)
    assert rule.variance['head'] == 0.1  # what is logged is phi
    # one that shrinks has the paper's ratio
    rule.update(2, measurement(0.4, 0.1, (1.0, 0.1)))
    assert rule.lr_scale['head'] == pytest.approx(0.5 * expected + 0.5 * 2.0)


def test_ratio_is_bounded_after_its_range():
    rule = modulator(bound_by_grad_norm=True)
    rule.grad_growth.average = torch.ones(2, dtype=torch.float64)
    rule.ema_decay = 0.5
    rule.update(0, measurement(1.0, 1e-4, (1.0, 4.0)))
    assert rule.lr_scale['head'] == pytest.approx(
        0.5 + 0.5 * 10 / (4 / 2.5) ** 0.5  # not of 100
    )
    rule.lr_scale['head'] = 0.1
    rule.update(1, measurement(1e-4, 1.0, (1.0, 1e6)))
    assert rule.lr_scale['head'] == pytest.approx(0.1)  # not below


def test_what_all_gradients_have_alike_cancels():
    usual = modulator(0.5)
    rule = modulator(0.5, bound_by_grad_norm=True)
    for update, factor in enumerate([100.0, 1.0, 1.0, 400.0]):
        for each in (usual, rule):
            each.update(update, measurement(0.4, 0.1, (factor, 2 * factor)))
    assert rule.lr_scale == pytest.approx(usual.lr_scale)


def test_module_without_gradient_keeps_its_average():
    growth = GradGrowth(['backbone', 'head'])

    def follow(*norms):
        norm = torch.tensor(norms, dtype=torch.float64)
        return growth.follow(norm, 0.5, 0).tolist()

    assert follow(1.0, 0.0) == [1.0, 1.0]
    assert growth.state_dict() == dict(backbone=1.0)
    assert follow(1.0, 2.0) == [1.0, 1.0]
    assert follow(1.0, 0.0) == [1.0, 1.0]
    assert growth.state_dict() == dict(backbone=1.0, head=2.0)
    assert follow(1.0, 6.0) == [1.0, pytest.approx(1.5**0.5)]


def test_another_batch_has_other_norms(caplog):
    groups = [
        dict(params=[torch.nn.Parameter(torch.ones(1))], module=module)
        for module in ('backbone', 'head')
    ]
    agvm = AGVM(
        torch.optim.SGD(groups, lr=0.1),
        settings=Settings(bound_by_grad_norm=True),
    )
    batch = dict(ranks=2, images_per_rank=2, accumulative_counts=1)
    agvm.set_batch(batch)
    agvm.modulator.update(0, measurement(0.4, 0.1))
    averages = dict(backbone=1.0, head=1.0)
    agvm.set_batch(dict(batch))
    assert agvm.modulator.grad_growth.state_dict() == averages
    with caplog.at_level(logging.INFO, 'mmagvm'):
        agvm.set_batch(dict(batch, ranks=4))
    assert agvm.modulator.grad_growth.state_dict() == {}
    assert 'measured anew' in caplog.text


# -- both


def test_neither_is_used_unless_asked_for():
    usual = modulator(0.75)
    usual.update(0, measurement(0.4, 0.1), lr=1.0)
    usual.update(1, measurement(0.4, 0.1, (1.0, 4.0)), lr=0.1)
    # 0.75 ** 2 + (1 - 0.75 ** 2) * 2
    assert usual.lr_scale['head'] == pytest.approx(1.4375)
    state = usual.state_dict()
    assert not {'restart_at_lr_drop', 'bound_by_grad_norm'} & set(state)


def test_state_goes_on_where_it_was():
    options = dict(restart_at_lr_drop=True, bound_by_grad_norm=True)
    rule, other = (modulator(0.75, **options) for _ in range(2))
    for update, rate in enumerate([1.0, 0.1]):
        rule.update(update, measurement(0.4, 0.1, (1.0, 2.0)), lr=rate)
    other.load_state_dict(rule.state_dict())
    for each in (rule, other):
        each.update(2, measurement(0.4, 0.1, (1.0, 9.0)), lr=0.1)
        each.update(3, measurement(0.4, 0.1, (1.0, 9.0)), lr=0.01)
    assert other.state_dict() == rule.state_dict()
    assert other.lr_scale != modulator().lr_scale


def test_checkpoint_of_another_rule_is_told(caplog):
    with_restart = modulator(restart_at_lr_drop=True)
    with_bound = modulator(bound_by_grad_norm=True)
    with_bound.update(0, measurement(0.4, 0.1))
    with_restart.update(0, measurement(0.4, 0.1), lr=9.0)
    with caplog.at_level(logging.INFO, 'mmagvm'):
        with_restart.load_state_dict(with_bound.state_dict())
    without, unused = caplog.messages
    assert 'without restart_at_lr_drop' in without
    assert 'with bound_by_grad_norm, which this run does not use' in unused
    assert with_restart.lr_scale['head'] == pytest.approx(2.0)
    assert with_restart.lr_drop.highest == 0  # the old run's is forgotten
