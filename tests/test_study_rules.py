"""The study's own rule for multipliers, by hand."""

from types import SimpleNamespace

import pytest
import torch
from study.rules import MeanOne, MeanOneHook
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
        agvm=SimpleNamespace(modulator=modulator),
    )


def measurement(backbone, head):
    """phi of both."""
    phis = torch.tensor([backbone, head], dtype=torch.float64)
    return Measurement(phis, True)


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


def test_hook_puts_the_rule_in_place():
    wrapper = wrapper_of(0.97)
    MeanOneHook().before_train(SimpleNamespace(optim_wrapper=wrapper))
    rule = wrapper.agvm.modulator
    assert type(rule) is MeanOne
    assert (rule.anchor, rule.ema_decay) == ('backbone', 0.97)
