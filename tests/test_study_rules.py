"""The study's other rules for multipliers, by hand."""

from types import SimpleNamespace

import pytest
import torch
from study.rules import RULES, Bounded, Forgetting, MeanOne, StudyRuleHook
from torch import nn

from mmagvm.core.grad_variance import Measurement
from mmagvm.core.modulator import Modulator


def wrapper_of(ema_decay):
    """A backbone of 3 parameters, and a head of 1."""
    groups = [
        dict(params=[nn.Parameter(torch.ones(3))], module='backbone'),
        dict(params=[nn.Parameter(torch.ones(1))], module='head'),
        # frozen, and of no module
        dict(params=[nn.Parameter(torch.ones(7), False)], module='head'),
        dict(params=[nn.Parameter(torch.ones(5))], module=None),
    ]
    modulator = Modulator(
        ['backbone', 'head'], 'backbone', ema_decay, 0.0, (0.1, 10.0)
    )
    return SimpleNamespace(
        optimizer=torch.optim.SGD(groups, lr=1.0),
        modulator=modulator,
        agvm=SimpleNamespace(accumulation=4, modulator=modulator),
    )


def measurement(backbone, head, norms=(1.0, 1.0)):
    """phi of both, and squared norms of their gradients, without noise."""
    return Measurement(
        torch.tensor([backbone, head], dtype=torch.float64),
        True,
        torch.tensor(norms, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
    )


def test_multipliers_have_mean_one_and_the_paper_s_ratio():
    rule = MeanOne(wrapper_of(0.0))
    rule.update(0, measurement(0.9, 0.1))
    # 1 and 3 over (3 * 1 + 1 * 3) / 4
    assert rule.lr_scale == pytest.approx(dict(backbone=2 / 3, head=2.0))
    # what is averaged are the paper's multipliers, not these
    rule.ema_decay = 0.5
    rule.update(1, measurement(0.1, 0.1))
    assert rule.lr_scale['head'] / rule.lr_scale['backbone'] == pytest.approx(
        2.0
    )


def test_average_begins_anew_when_the_rate_falls():
    wrapper = wrapper_of(0.75)
    rule, usual = Forgetting(wrapper), wrapper.modulator
    for modulator in (rule, usual):
        modulator.update(0, measurement(0.4, 0.1))
    assert rule.lr_scale == usual.lr_scale  # 0.75 + 0.25 * 2
    for group in wrapper.optimizer.param_groups:
        group['lr'] = 0.1
    expected = [3.0, 2.0, 5 / 3, 1.5, 1.375]  # the fifth has 0.75 of the old
    for update, (phi, value) in enumerate(
        zip([0.9, 0.1, 0.1, 0.1, 0.1], expected), 1
    ):
        rule.update(update, measurement(phi, 0.1))
        assert rule.lr_scale['head'] == pytest.approx(value)
    assert rule.ema_decay == 0.75


def test_ratio_of_a_growing_gradient_is_bounded():
    rule = Bounded(wrapper_of(0.0))
    rule.update(0, measurement(0.4, 0.1))
    assert rule.lr_scale['head'] == pytest.approx(2.0)
    rule.ema_decay = 0.5
    # squares of norms: 1, then 4 with an average of 2.5
    rule.update(1, measurement(0.4, 0.1, (4.0, 4.0)))
    assert rule.lr_scale['head'] == pytest.approx(
        0.5 * 2.0 + 0.5 * 2.0 / (4 / 2.5) ** 0.5
    )
    # one that shrinks has the paper's ratio
    before = rule.lr_scale['head']
    rule.update(2, measurement(0.4, 0.1, (0.1, 0.1)))
    assert rule.lr_scale['head'] == pytest.approx(0.5 * before + 0.5 * 2.0)


@pytest.mark.parametrize('name', RULES)
def test_hook_puts_a_rule_in_place(name):
    wrapper = wrapper_of(0.97)
    StudyRuleHook(name).before_train(SimpleNamespace(optim_wrapper=wrapper))
    rule = wrapper.agvm.modulator
    assert type(rule) is RULES[name]
    assert (rule.anchor, rule.ema_decay) == ('backbone', 0.97)
