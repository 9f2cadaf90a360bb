"""SOAP and Muon: their steps, their parameters, and shared work.

1. Cutting work into parts, and weights into matrices and the rest.
2. Steps against the library's own SOAP, and Muon's written out.
3. Work that ranks share; what comes of it is in test_ranks.py.
"""

import math

import pytest
import torch
import torch.distributed as dist
from mmengine.optim import build_optim_wrapper
from mmengine.registry import OPTIMIZERS
from torch import nn

from mmagvm.recipes.shared_work import balance, share

pytorch_optimizer = pytest.importorskip('pytorch_optimizer')
from mmagvm.recipes.matrix_optimizers import (  # noqa: E402
    is_matrix,
    orthogonalize,
    split_matrices,
)

NAMES = ('SOAP', 'Muon')
UPDATES = 12


def make_net(dtype=torch.float64):
    """Every kind of weight that mmdet's and mmseg's models have."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),  # depthwise
        nn.Conv2d(8, 6, 1, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )
    net.position = nn.Parameter(torch.randn(1, 5))
    net.unused = nn.Parameter(torch.randn(4, 3))
    net.late = nn.Linear(5, 5)
    return net.to(dtype)


def train(net, optimizer, updates=UPDATES, start=0, late=3):
    """Weights of ``net.late`` have their first gradient in update ``late``."""
    for update in range(start, updates):
        generator = torch.Generator().manual_seed(update)
        images = torch.randn(9, 3, 8, 8, generator=generator)
        found = net(images.to(net.position.dtype)) + net.position
        if update >= late:
            found = found + net.late(found)
        optimizer.zero_grad()
        (found - 1).square().mean().backward()
        optimizer.step()


def trained(name, **options):
    net = make_net(options.pop('dtype', torch.float64))
    late = options.pop('late', 3)
    optimizer = OPTIMIZERS.build(
        dict(type=name, params=net.parameters(), lr=0.01, **options)
    )
    train(net, optimizer, late=late)
    return net, optimizer


def assert_equal(ours, theirs):
    for (name, weight), other in zip(
        ours.state_dict().items(), theirs.state_dict().values()
    ):
        assert torch.equal(weight, other), name


# -- parts of the work


@pytest.mark.parametrize(
    'costs, parts, expected',
    [
        ([], 2, [[], []]),
        ([5.0], 2, [[0], []]),
        ([1.0, 1.0, 1.0, 1.0], 2, [[0, 2], [1, 3]]),
        ([1.0, 9.0, 2.0, 3.0, 2.0], 2, [[1], [0, 2, 3, 4]]),
        ([3.0, 3.0, 2.0, 2.0, 2.0], 2, [[0, 2, 4], [1, 3]]),
    ],
)
def test_work_is_cut_into_parts_that_cost_alike(costs, parts, expected):
    assert balance(costs, parts) == expected


@pytest.mark.parametrize(
    'shape, matrix',
    [
        ((), False),
        ((7,), False),
        ((4, 3), True),
        ((8, 3, 3, 3), True),
        ((8, 1, 3, 3), True),  # depthwise
        ((1, 5), False),  # a single row, such as a position embedding
        ((5, 1), False),
        ((1, 6, 1, 1), False),
    ],
)
def test_what_has_rows_and_columns_is_a_matrix(shape, matrix):
    assert is_matrix(torch.zeros(shape)) is matrix


def test_groups_are_split_with_the_lists_beside_their_weights():
    weight, bias = torch.ones(3, 2), torch.ones(3)
    queries, scale = torch.ones(9, 4), torch.ones(1)
    groups = split_matrices(
        [
            dict(params=[bias, weight], param_names=['b', 'w'], module='neck'),
            dict(params=[queries], use_muon=False, lr=0.1),
            dict(params=scale),
        ]
    )
    assert [(g['use_muon'], g.get('param_names')) for g in groups] == [
        (True, ['w']),
        (False, ['b']),
        (False, None),
        (False, None),
    ]
    assert [g['params'][0] is p for g, p in zip(groups, (weight, bias))]
    assert [g.get('module') for g in groups[:2]] == ['neck', 'neck']
    assert groups[2]['params'][0] is queries and groups[2]['lr'] == 0.1


def test_a_vector_that_is_called_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r'shape \(3,\).*leave use_muon out'):
        split_matrices([dict(params=[torch.ones(3)], use_muon=True)])


@pytest.mark.parametrize('name', NAMES)
def test_steps_one_by_one_are_refused(name):
    with pytest.raises(ValueError, match='foreach=False.*leave it out'):
        trained(name, foreach=False)


# -- steps


@pytest.mark.parametrize('frequency', [1, 4])
def test_soap_steps_as_the_library_does(frequency):
    options = dict(precondition_frequency=frequency, weight_decay=0.05)
    # the library decomposes in float32, whatever the weights are, and renews
    # a basis that comes late at once, if it is time
    dtype = torch.float32
    ours, _ = trained('SOAP', foreach=True, dtype=dtype, late=0, **options)
    theirs = make_net(dtype)
    train(
        theirs,
        pytorch_optimizer.SOAP(theirs.parameters(), lr=0.01, **options),
        late=0,
    )
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight)


def test_soap_on_vectors_is_adamw_one_update_later():
    """With one decay for both moments, as SOAP has by default."""
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    soap = OPTIMIZERS.build(
        dict(type='SOAP', params=[ours], lr=0.01, weight_decay=0.0)
    )
    adamw = torch.optim.AdamW(
        [theirs], lr=0.01, betas=(0.95, 0.95), weight_decay=0.0
    )
    for update in range(6):
        grad = torch.randn(5, generator=torch.Generator().manual_seed(update))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        soap.step()
        if update:
            adamw.step()
    torch.testing.assert_close(ours, theirs)


def test_muon_steps_as_it_is_defined():
    net, optimizer = trained('Muon', weight_decay=0.05)
    theirs = make_net()
    matrices = [p for p in theirs.parameters() if is_matrix(p)]
    rest = [p for p in theirs.parameters() if not is_matrix(p)]
    adamw = torch.optim.AdamW(
        rest, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05
    )
    momenta = [torch.zeros_like(p) for p in matrices]

    class ByHand:
        zero_grad = staticmethod(lambda: theirs.zero_grad(set_to_none=True))

        @staticmethod
        @torch.no_grad()
        def step():
            adamw.step()
            for m, p in zip(momenta, matrices):
                if p.grad is None:
                    continue
                p *= 1 - 0.01 * 0.05
                m.mul_(0.95).add_(p.grad, alpha=0.05)
                u = 0.95 * m + 0.05 * p.grad
                x = u.flatten(1).float()
                x = x / x.norm()
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                size = 0.2 * math.sqrt(max(x.shape))
                p -= 0.01 * size * x.view(p.shape)

    train(theirs, ByHand)
    for name, weight in theirs.state_dict().items():
        if name in ('0.bias', '2.bias'):
            continue  # what batch norm cancels has no gradient but rounding
        torch.testing.assert_close(
            net.state_dict()[name], weight, rtol=1e-3, atol=2e-4
        )
    assert not torch.equal(net.late.weight, make_net().late.weight)


def test_orthogonal_factors_have_singular_values_near_one():
    torch.manual_seed(0)
    matrices = [torch.randn(6, 2, 3), torch.randn(6, 6), torch.randn(9, 4)]
    for matrix, factor in zip(matrices, orthogonalize(matrices, [5, 5, 9])):
        u, s, v = torch.linalg.svd(matrix.flatten(1), full_matrices=False)
        found = torch.linalg.svdvals(factor)
        assert ((0.6 < found) & (found < 1.3)).all()
        # the same singular vectors
        inside = u.T @ factor @ v.T
        torch.testing.assert_close(
            inside, torch.diag(inside.diagonal()), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize('name', NAMES)
def test_groups_can_differ_in_rate_and_decay(name):
    net = make_net()
    wrapper = build_optim_wrapper(
        net,
        dict(
            type='OptimWrapper',
            optimizer=dict(type=name, lr=0.01, weight_decay=0.05),
            paramwise_cfg=dict(
                norm_decay_mult=0.0,
                custom_keys={
                    '5': dict(lr_mult=0.0, decay_mult=0.0),
                    '3': dict(use_muon=False) if name == 'Muon' else {},
                },
            ),
        ),
    )
    train(net, wrapper.optimizer, 4)
    assert torch.equal(net[5].weight, make_net()[5].weight)
    assert not torch.equal(net[0].weight, make_net()[0].weight)
    if name == 'Muon':
        state = wrapper.optimizer.state
        assert set(state[net[3].weight]) == {'exp_avg', 'exp_avg_sq'}
        assert set(state[net[0].weight]) == {'momentum_buffer'}
        assert set(state[net.position]) == {'exp_avg', 'exp_avg_sq'}


@pytest.mark.parametrize('name', NAMES)
def test_parameters_can_be_added_later(name):
    """As if a layer is unfrozen in a plain loop."""
    net = make_net()
    optimizer = OPTIMIZERS.build(
        dict(type=name, params=net[:5].parameters(), lr=0.01)
    )
    train(net, optimizer, updates=3)
    optimizer.add_param_group(dict(params=list(net[5].parameters())))
    train(net, optimizer, updates=6, start=3)
    assert not torch.equal(net[5].weight, make_net()[5].weight)
    assert not torch.equal(net[5].bias, make_net()[5].bias)
    if name == 'Muon':
        assert 'momentum_buffer' in optimizer.state[net[5].weight]
        assert 'momentum_buffer' not in optimizer.state[net[5].bias]


def test_options_that_are_lists_stay_whole():
    conv = nn.Conv2d(2, 4, 1)
    groups = split_matrices(
        [dict(params=list(conv.parameters()), betas=[0.9, 0.95])]
    )
    assert [group['betas'] for group in groups] == [[0.9, 0.95]] * 2


def test_gradients_that_are_not_finite_raise_nothing():
    """Otherwise the rank with that part would leave the others waiting."""
    net = make_net()
    optimizer = OPTIMIZERS.build(
        dict(type='SOAP', params=net.parameters(), precondition_frequency=1)
    )
    for _ in range(3):
        for param in net.parameters():
            param.grad = torch.full_like(param, torch.nan)
        optimizer.step()


# -- ranks


def share_everything():
    """The jobs that this rank did, and its results."""
    done = []

    def do(jobs):
        done.extend(jobs)
        return [
            [torch.full((job + 1, 2), float(job)), torch.full((3,), -job)]
            for job in jobs
        ]

    results = share(
        [1.0, 4.0, 2.0],
        [[(job + 1, 2), (3,)] for job in range(3)],
        torch.empty(0),
        do,
    )
    nothing = share([], [], torch.empty(0), do)
    return done, results, nothing


def count_reductions(name):
    """Collectives of a training that exchange results."""
    all_reduce, calls = dist.all_reduce, []

    def counting(*args, **kwargs):
        calls.append(args)
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counting
    try:
        trained(name)
    finally:
        dist.all_reduce = all_reduce
    return len(calls)


def train_apart(name, **options):
    """Weights that each rank trains alone; the error message."""
    net = make_net()
    for param in net.parameters():
        param.data += dist.get_rank()
    optimizer = OPTIMIZERS.build(
        dict(type=name, params=net.parameters(), lr=0.01, **options)
    )
    try:
        train(net, optimizer, updates=3)
    except ValueError as error:
        return str(error)
    return net[0].weight.tolist()


def share_work():
    """All common work of the ranks, on one of them."""
    nets = {
        name: trained(name, **options)[0].state_dict()
        for name, options in (
            ('SOAP', dict(precondition_frequency=3)),
            ('Muon', {}),
        )
    }
    apart = {
        (name, shared): train_apart(name, share_work=shared)
        for name in NAMES
        for shared in (True, False)
    }
    return share_everything(), nets, count_reductions('Muon'), apart
