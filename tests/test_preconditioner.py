"""phi in the optimizer's own metric.

1. Which preconditioner an optimizer has, by its class and state.
2. phi of accumulated micro-batches against brute force: every gradient by
   itself, multiplied by the preconditioner as one explicit matrix, then the
   definition of phi. That of 2 to 4 ranks is in test_ranks.py.
"""

from copy import deepcopy
from functools import reduce

import pytest
import torch
import torch.distributed as dist
from mmengine.optim import build_optim_wrapper
from mmengine.registry import OPTIMIZERS
from oracle import mean, module_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from toy import make_batch, make_model, wrapper_cfg

from mmagvm.core.grad_variance.preconditioner import (
    Elementwise,
    Preconditioner,
    Rotated,
    find_preconditioner,
)

pytest.importorskip('pytorch_optimizer')
UPDATES = 7
OPTIONS = dict(
    SGD=dict(momentum=0.9),
    AdamW={},
    LAMB={},
    SOAP=dict(precondition_frequency=2),
    Muon={},
)
ESTIMATORS = ('split', 'pairs')


# -- which one


def built(name, updates, **options):
    model = nn.Linear(3, 2)
    optimizer = OPTIMIZERS.build(
        dict(type=name, params=model.parameters(), lr=0.01, **options)
    )
    for _ in range(updates):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize('updates', [0, 2])
@pytest.mark.parametrize(
    'name, kind',
    [
        ('SGD', Preconditioner),
        ('RMSprop', Preconditioner),
        ('LARS', Preconditioner),
        ('Muon', Preconditioner),
        ('Adam', Elementwise),
        ('AdamW', Elementwise),
        ('NAdam', Elementwise),
        ('LAMB', Elementwise),
        ('PMDLAMB', Elementwise),
        ('SOAP', Rotated),
    ],
)
def test_preconditioner_is_found(name, kind, updates):
    assert type(find_preconditioner(built(name, updates))) is kind


def test_second_moment_in_an_unknown_basis_is_not_taken_for_adams():
    for spoil in (
        lambda state: state.update(Q=[torch.eye(2)]),
        lambda state: state.update(projector=object()),
        lambda state: state.update(exp_avg_sq=torch.ones(1, 3)),
        lambda state: state.pop('exp_avg_sq'),
    ):
        optimizer = built('AdamW', 1)
        spoil(next(iter(optimizer.state.values())))
        # of one parameter of two: norms of a module must not be mixed
        assert type(find_preconditioner(optimizer)) is Preconditioner


# -- against brute force


class ConvDetector(nn.Module):
    """Convolutions of several shapes, as detectors have them."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Conv2d(5, 4, (1, 2), bias=False)
        )
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, inputs):
        images = torch.cat([inputs, inputs.cos(), inputs.sin()], 1)
        images = images.view(-1, 2, 3, 3).repeat(1, 1, 1, 2)
        return self.head(self.backbone(images)).square().mean()


def make_conv_model():
    torch.manual_seed(0)
    return ConvDetector().double()


def as_matrix(param, group, state, total):
    """The preconditioner of a parameter as one matrix; None if unknown.

    Args:
        total: This update's gradient, to be counted in v; None for v_{t-1}.
    """
    size, values = param.numel(), state.get(param) or {}
    rotation = torch.eye(size, dtype=param.dtype)
    if 'Q' in values:
        bases = [
            q if len(q) else torch.eye(n, dtype=param.dtype)
            for q, n in zip(values['Q'], param.shape)
        ]
        rotation = reduce(torch.kron, bases).T
    v = values.get('exp_avg_sq', torch.zeros_like(param)).flatten()
    if total is not None:
        beta2 = group['betas'][1]
        rotated = rotation @ total.flatten()
        v = beta2 * v + (1 - beta2) * rotated**2
    divisor = v.sqrt() + group['eps']
    if total is None:
        divisor[v == 0] = torch.inf
    return torch.diag(1 / divisor) @ rotation


def brute_force(samples, optimizer, names, estimator, preconditioned, halves):
    """phi by module, by the definition."""
    phis = {}
    total = mean(samples)
    flat = {}
    for group in optimizer.param_groups:
        for param, name in zip(group['params'], group['param_names']):
            matrix = torch.eye(param.numel(), dtype=param.dtype)
            if preconditioned:
                matrix = as_matrix(
                    param,
                    group,
                    optimizer.state,
                    total[name] if estimator == 'split' else None,
                )
            parts = [matrix @ sample[name].flatten() for sample in samples]
            flat.setdefault(names(name), []).append(torch.stack(parts))
    for module, parts in flat.items():
        vectors = torch.cat(parts, 1)  # a row for each sample
        if estimator == 'split':
            first, second = (vectors[half].mean(0) for half in halves)
            cosine = first @ second / (first.norm() * second.norm())
            phis[module] = (1 - cosine).item()
            continue
        count = len(vectors)
        products = vectors @ vectors.T
        signal = (products.sum() - products.trace()) / (count * (count - 1))
        noise = products.trace() / count - signal
        phis[module] = (1 - signal / (signal + 2 * noise / count)).item()
    return phis


def measured_and_expected(
    make, name, estimator, rank=0, ranks=1, accumulation=1
):
    """The history of a training, and each entry by brute force."""
    model = make()
    cfg = wrapper_cfg(
        estimator=estimator,
        interval=2,
        ema_decay=0.5,
        accumulative_counts=accumulation,
    )
    cfg['optimizer'] = dict(type=name, lr=0.01, **OPTIONS[name])
    wrapper = build_optim_wrapper(model, cfg)
    trained = model
    if ranks > 1:
        trained = DistributedDataParallel(model, bucket_cap_mb=2e-4)
    expected = {}
    for update in range(UPDATES):
        samples = []
        for micro_batch in range(accumulation):
            twin = deepcopy(model)
            twin(make_batch(update, rank, micro_batch)).backward()
            samples.append(
                {key: param.grad for key, param in twin.named_parameters()}
            )
        if ranks > 1:
            own, samples = mean(samples), [None] * ranks
            dist.all_gather_object(samples, own)
            halves = slice(0, None, 2), slice(1, None, 2)
        else:
            first = accumulation // 2
            halves = slice(first), slice(first, None)
        expected[update] = brute_force(
            samples,
            wrapper.optimizer,
            module_of if make is make_model else lambda n: n.split('.')[0],
            estimator,
            name in ('AdamW', 'LAMB', 'SOAP'),
            halves,
        )
        for micro_batch in range(accumulation):
            with wrapper.optim_context(trained):
                loss = trained(make_batch(update, rank, micro_batch))
            wrapper.update_params(loss)
    modules = wrapper.modulator.modules
    return [
        (update, dict(zip(modules, phis)), expected[update])
        for update, phis in wrapper.modulator.history
    ]


def check(found, name, estimator):
    """Every measurement equals brute force."""
    # SOAP's basis comes with the first update, and v with the second; AdamW's
    # v with the first
    waits = name == 'SOAP' or (
        estimator == 'pairs' and name in ('AdamW', 'LAMB')
    )
    updates = [update for update, _, _ in found]
    assert updates == ([2, 4, 6] if waits else [0, 2, 4, 6])
    for _, phis, expected in found:
        assert phis == pytest.approx(expected, rel=1e-7, abs=1e-9)
        assert len({round(phi, 3) for phi in phis.values()}) > 1


@pytest.mark.parametrize('make', [make_model, make_conv_model])
@pytest.mark.parametrize('estimator', ESTIMATORS)
@pytest.mark.parametrize('name', OPTIONS)
def test_phi_of_micro_batches_is_in_the_optimizers_metric(
    name, estimator, make
):
    found = measured_and_expected(make, name, estimator, accumulation=3)
    check(found, name, estimator)
