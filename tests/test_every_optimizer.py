"""Every optimizer of torch and of pytorch_optimizer that plain options build.

Each trains a toy with AGVM and without it. What is claimed of all: measuring
changes nothing, multipliers have their effect or are refused, phi does not
depend on the scale of the loss, and nothing raises anything but a sentence.
"""

import inspect
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from mmagvm.core import AGVM, Settings, module_groups
from mmagvm.core.grad_variance.preconditioner import (
    Elementwise,
    Preconditioner,
    Rotated,
    find_preconditioner,
)
from mmagvm.core.grad_variance.probe import traits_of

library = pytest.importorskip('pytorch_optimizer')
UPDATES = 4
#: Those whose step wants a closure, a second derivative, or a model.
OTHER_LOOPS = {'LBFGS'}
CLASSES = {
    **{
        f'torch.{name}': cls
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls)
        and issubclass(cls, torch.optim.Optimizer)
        and cls is not torch.optim.Optimizer
        and name not in OTHER_LOOPS
    },
    **{
        cls.__name__: cls
        for cls in library.optimizer.OPTIMIZERS.values()
        if inspect.isclass(cls)
    },
}
#: Options of every group beside the defaults.
OPTIONS = {
    **dict.fromkeys(
        ['GaLore', 'Fira', 'APOLLO'],
        dict(rank=4, update_proj_gap=2, scale=1.0, projection_type='std'),
    ),
}


#: They move at the smallest rate, or rotate by a basis that six gradients do
#: not determine, so that two runs differ in weights or basis.
NOT_AT_REST = {'AdaBound', 'AvaGrad', 'DualAdam', 'SOAP'}


class Net(nn.Module):
    """Two modules, with matrices large enough to be factored."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 16), nn.Tanh())
        self.head = nn.Linear(16, 8)

    def forward(self, inputs):
        return self.head(self.backbone(inputs)).cos().sum(1).mean()


def make_net():
    torch.manual_seed(0)
    return Net()


def batch_of(update, micro_batch):
    generator = torch.Generator().manual_seed(10 * update + micro_batch)
    return torch.randn(6, 12, generator=generator)


def build(name, model, lr=None):
    """The optimizer; a test is skipped where plain options build none."""
    groups = [
        dict(group, **OPTIONS.get(name, {})) for group in module_groups(model)
    ]
    options = {}
    parameters = inspect.signature(CLASSES[name]).parameters
    if parameters['lr'].default in (None, inspect.Parameter.empty):
        options['lr'] = 1e-3
    if lr is not None:
        options['lr'] = lr
    try:
        return CLASSES[name](groups, **options)
    except Exception as error:
        pytest.skip(f'{name} cannot be built so: {error}')


def buildable():
    return [
        name
        for name, cls in sorted(CLASSES.items())
        if 'params' in (known := inspect.signature(cls).parameters)
        and 'lr' in known
        and all(
            p.default is not p.empty or p.kind in (p.VAR_KEYWORD,)
            for key, p in known.items()
            if key not in ('params', 'lr')
        )
    ]


def train(name, agvm_too=True, factor=1.0, scales=None, lr=None, **settings):
    """Weights after some updates, and AGVM if it is there."""
    model = make_net()
    optimizer = build(name, model, lr)
    seed_all()  # some draw numbers
    agvm = None
    if agvm_too:
        agvm = AGVM(optimizer, model, Settings(interval=1, **settings), 2)
        drawn = draws()
        seed_all()
        assert draws() == drawn  # trying the optimizer has drawn none
        seed_all()
        if scales:
            agvm.modulator.lr_scale.update(scales)
    for update in range(UPDATES):
        for micro_batch in range(2):
            batch = batch_of(update, micro_batch)
            if agvm is None:
                (model(batch) * factor / 2).backward()
                continue
            with agvm.micro_batch():
                (model(batch) * factor / 2).backward()
            agvm.step()
        if agvm is None:
            optimizer.step()
        optimizer.zero_grad()
    return model, agvm


def seed_all():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def draws():
    return torch.rand(1).item(), random.random(), np.random.random()


def stepped_alone(name):
    """Weights of plain training; skipped where it is not possible."""
    try:
        return train(name, agvm_too=False)[0]
    except Exception as error:
        pytest.skip(f'{name} needs another loop: {type(error)} {error}')


def refused_without_lr(name):
    """Skip an optimizer that has no rate to scale, which is refused."""
    model = make_net()
    optimizer = build(name, model)
    if optimizer.param_groups[0].get('lr') is None:
        with pytest.raises(ValueError, match='no learning rate to scale'):
            AGVM(optimizer, model, Settings(), 2)
        pytest.skip(f'{name} has no learning rate')


def moved(model):
    """How far the weights of each module have come."""
    first = make_net()
    return [
        math.sqrt(
            sum(
                (a - b).square().sum().item()
                for a, b in zip(
                    getattr(model, module).parameters(),
                    getattr(first, module).parameters(),
                )
            )
        )
        for module in ('backbone', 'head')
    ]


@pytest.mark.parametrize('name', buildable())
def test_measuring_changes_nothing_and_phi_has_no_scale(name):
    plain = stepped_alone(name)
    for estimator in ('pairs', 'split'):
        refused_without_lr(name)
        model, agvm = train(name, modulate=False, estimator=estimator)
        for key, weight in plain.state_dict().items():
            torch.testing.assert_close(
                model.state_dict()[key],
                weight,
                rtol=0,
                atol=0,
                equal_nan=True,
                msg=f'{name} {estimator} {key}',
            )
        history = agvm.modulator.history
        if not all(w.isfinite().all() for w in plain.state_dict().values()):
            continue
        assert history, name
        if name in NOT_AT_REST:
            continue
        # weights that stay where they are, and no gradient as small as eps
        found = [
            train(
                name,
                modulate=False,
                estimator=estimator,
                lr=1e-12,
                factor=factor,
            )[1].modulator.history[0]
            for factor in (1e3, 1e6)
        ]
        assert found[0][0] == found[1][0]
        assert found[0][1] == pytest.approx(found[1][1], abs=0.02)


@pytest.mark.parametrize('name', buildable())
def test_multipliers_have_their_effect_or_are_refused(name):
    refused_without_lr(name)
    stepped_alone(name)
    keep = dict(begin=10**6)
    try:
        usual, _ = train(name, **keep)
    except ValueError as error:
        assert 'set modulate=False' in str(error)
        model = make_net()
        assert traits_of(build(name, model)).scales is False
        return
    faster, _ = train(name, scales=dict(head=3.0), **keep)
    before, after = moved(usual), moved(faster)
    if 0 in before + after:
        pytest.skip(f'{name} does not move in {UPDATES} updates')
    # as some normalize, or take a root of the rate
    assert after[1] / before[1] / (after[0] / before[0]) > 1.2, name


@pytest.mark.parametrize(
    'name, kind',
    [
        ('torch.AdamW', Elementwise),
        ('torch.NAdam', Elementwise),
        ('torch.SGD', Preconditioner),
        ('torch.Adafactor', Preconditioner),
        ('AdamP', Elementwise),
        ('SOAP', Rotated),
        ('Conda', Preconditioner),
        ('GaLore', Preconditioner),
        ('Fira', Preconditioner),
        ('SPAM', Preconditioner),
        ('MADGRAD', Preconditioner),
        ('CAME', Preconditioner),
    ],
)
def test_metric_of_optimizers_by_name(name, kind):
    _, agvm = train(name, modulate=False)
    assert type(find_preconditioner(agvm.optimizer)) is kind


@pytest.mark.parametrize('name', ['Prodigy', 'DAdaptAdam', 'DAdaptSGD'])
def test_rates_without_effect_are_refused(name):
    model = make_net()
    optimizer = build(name, model)
    with pytest.raises(ValueError, match=f'{name} uses .*set modulate=False'):
        AGVM(optimizer, model, Settings(), 2)
    assert AGVM(optimizer, model, Settings(modulate=False), 2).attached
