"""LARS, LAMB and PMDLAMB: their steps by hand; AGVM on top of each and of SOAP
and Muon, whose steps are in test_matrix_optimizers.py.
"""

import io
import subprocess
import sys

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import OPTIMIZERS
from toy import make_batch, make_model, train, wrapper_cfg

import mmagvm  # noqa: F401

pytest.importorskip('pytorch_optimizer')
NAMES = ('LARS', 'LAMB', 'PMDLAMB', 'SOAP', 'Muon')
OPTIONS = dict(PMDLAMB=dict(period=2), SOAP=dict(precondition_frequency=2))
LR, DECAY = 0.1, 0.01
BETAS, EPS = (0.9, 0.99), 1e-6


def some_weights():
    """A weight that the clamp of LAMB's norm does not touch, and a vector."""
    torch.manual_seed(1)
    weights = torch.randn(3, 4), torch.randn(5)
    return [torch.nn.Parameter(weight.double()) for weight in weights]


def some_gradients(update):
    generator = torch.Generator().manual_seed(update)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 4), (5,))
    ]


def stepped(name, updates, **options):
    params = some_weights()
    optimizer = OPTIMIZERS.build(
        dict(type=name, params=params, lr=LR, weight_decay=DECAY, **options)
    )
    for update in range(updates):
        for param, grad in zip(params, some_gradients(update)):
            param.grad = grad
        optimizer.step()
    return optimizer, [param.detach() for param in params]


def lamb_by_hand(updates, period=None, moment_decay=None):
    weights = [weight.detach() for weight in some_weights()]
    firsts = [torch.zeros_like(weight) for weight in weights]
    seconds = [torch.zeros_like(weight) for weight in weights]
    for update in range(updates):
        for i, grad in enumerate(some_gradients(update)):
            firsts[i] = BETAS[0] * firsts[i] + (1 - BETAS[0]) * grad
            seconds[i] = BETAS[1] * seconds[i] + (1 - BETAS[1]) * grad**2
            ratio = firsts[i] / (seconds[i].sqrt() + EPS)
            ratio += DECAY * weights[i]
            trust = weights[i].norm() / (ratio.norm() + EPS)
            weights[i] = weights[i] - LR * trust * ratio
            if period and (update + 1) % period == 0:
                firsts[i] = firsts[i] * moment_decay
                seconds[i] = seconds[i] * moment_decay
    return weights


def test_lars_steps_by_the_paper():
    _, weights = stepped('LARS', 3, momentum=0.9, trust_coefficient=0.02)
    expected = [weight.detach() for weight in some_weights()]
    buffers = [torch.zeros_like(weight) for weight in expected]
    for update in range(3):
        matrix, vector = some_gradients(update)
        norm = expected[0].norm()
        ratio = 0.02 * norm / (matrix.norm() + DECAY * norm)
        steps = ratio * (matrix + DECAY * expected[0]), vector
        for i, step in enumerate(steps):
            buffers[i] = 0.9 * buffers[i] + step
            expected[i] = expected[i] - LR * buffers[i]
    for ours, theirs in zip(weights, expected):
        torch.testing.assert_close(ours, theirs)


def test_lamb_steps_by_the_paper():
    _, weights = stepped('LAMB', 3, betas=BETAS)
    for ours, theirs in zip(weights, lamb_by_hand(3)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('foreach', [None, False])
@pytest.mark.parametrize('period, decay', [(1, 0.3), (2, 0.5), (3, 0.0)])
def test_moments_decay_periodically(period, decay, foreach):
    optimizer, weights = stepped(
        'PMDLAMB',
        6,
        betas=BETAS,
        period=period,
        moment_decay=decay,
        foreach=foreach,
    )
    for ours, theirs in zip(weights, lamb_by_hand(6, period, decay)):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(weights[0], lamb_by_hand(6)[0])


@pytest.mark.parametrize('options', [dict(moment_decay=1.0), dict(period=9)])
def test_without_decay_it_is_lamb(options):
    for ours, theirs in zip(
        stepped('PMDLAMB', 4, **options)[1], stepped('LAMB', 4)[1]
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    'options', [dict(period=0), dict(period=1.5), dict(moment_decay=1.1)]
)
def test_senseless_decay_is_refused(options):
    with pytest.raises(ValueError, match=f'{[*options][0]}=.*: write'):
        stepped('PMDLAMB', 0, **options)


# -- under AGVM


def agvm_wrapper(model, name, paramwise_cfg=None, **options):
    cfg = wrapper_cfg(
        paramwise_cfg=paramwise_cfg,
        interval=2,
        ema_decay=0.5,
        accumulative_counts=2,
    )
    cfg['optimizer'] = dict(type=name, lr=0.01, weight_decay=0.01, **options)
    return build_optim_wrapper(model, cfg)


def trained(name, updates=5, model=None, wrapper=None, start=0, **options):
    model = model or make_model()
    wrapper = wrapper or agvm_wrapper(model, name, **options)
    train(model, wrapper, updates, accumulation=2, start=start)
    return model, wrapper


@pytest.mark.parametrize('name', NAMES)
def test_agvm_modulates_it(name):
    options = OPTIONS.get(name, {})
    model, wrapper = trained(name, **options)
    assert type(wrapper.optimizer).__name__ == name
    # SOAP's first update makes its bases
    assert wrapper.modulator.measured == 3 - (name == 'SOAP')
    scales = wrapper.modulator.lr_scale
    assert scales['backbone'] == 1
    assert all(scales[m] != 1 for m in scales if m != 'backbone')
    assert {group['lr'] for group in wrapper.optimizer.param_groups} == {0.01}
    plain = make_model()
    cfg = wrapper_cfg(accumulative_counts=2, modulate=False)
    cfg['optimizer'] = dict(type=name, lr=0.01, weight_decay=0.01, **options)
    trained(name, model=plain, wrapper=build_optim_wrapper(plain, cfg))
    for module in ('neck', 'rpn_head'):  # the last updates had another lr
        ours, theirs = (getattr(m, module).weight for m in (model, plain))
        assert not torch.equal(ours, theirs)


@pytest.mark.parametrize(
    'name, like, options',
    [
        ('LARS', 'SGD', {}),
        ('LAMB', 'AdamW', dict(eps=1e-6)),
        ('PMDLAMB', 'AdamW', dict(eps=1e-6)),
    ],
)
def test_variance_is_measured_as_for_its_kin(name, like, options):
    ours, theirs, sgd = (
        trained(optimizer, 1, **(options if optimizer == 'AdamW' else {}))[1]
        for optimizer in (name, like, 'SGD')
    )
    assert ours.modulator.variance == pytest.approx(theirs.modulator.variance)
    raw = pytest.approx(sgd.modulator.variance) == ours.modulator.variance
    assert raw == (name == 'LARS')


@pytest.mark.parametrize('name', NAMES)
def test_resumed_training_equals_uninterrupted(name):
    options = OPTIONS.get(name, {})
    whole, _ = trained(name, 5, **options)
    model, wrapper = trained(name, 3, **options)
    file = io.BytesIO()
    torch.save((model.state_dict(), wrapper.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    model = make_model(seed=1)
    wrapper = agvm_wrapper(model, name, **options)
    model.load_state_dict(weights)
    wrapper.load_state_dict(state)
    trained(name, 5, model, wrapper, start=3)
    for name, weight in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


@pytest.mark.parametrize('name', ['LAMB', 'PMDLAMB'])
def test_biases_can_be_left_unadapted(name):
    model = make_model()
    _, wrapper = trained(
        name,
        2,
        model,
        agvm_wrapper(
            model,
            name,
            paramwise_cfg=dict(
                custom_keys=dict(bias=dict(adam=True, decay_mult=0.0))
            ),
        ),
    )
    for group in wrapper.optimizer.param_groups:
        for name in group['param_names']:
            assert group['adam'] == name.endswith('bias')
            assert group['weight_decay'] == (0 if group['adam'] else 0.01)


def test_batches_differ():
    """Otherwise the tests above would measure nothing."""
    assert not torch.equal(make_batch(0, 0, 0), make_batch(0, 0, 1))


# -- without the library


def test_missing_library_is_named_when_needed():
    code = (
        "import sys; sys.modules['pytorch_optimizer'] = None\n"
        'import mmagvm, torch\n'
        'from mmengine.registry import OPTIMIZERS\n'
        'params = [torch.nn.Parameter(torch.ones(1))]\n'
        "OPTIMIZERS.build(dict(type='SGD', params=params, lr=1))\n"
        f'for name in {NAMES!r}:\n'
        '    try:\n'
        '        OPTIMIZERS.build(dict(type=name, params=params, lr=1))\n'
        '    except ImportError as error: print(error)\n'
        '    except ValueError as error: print(name, "is torch\'s")\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True
    )
    expected = [
        f"optimizer type='{name}' needs the library pytorch_optimizer: pip "
        "install 'mmagvm[optimizers]'"
        for name in NAMES
    ]
    if hasattr(torch.optim, 'Muon'):  # which takes matrices only
        expected[-1] = "Muon is torch's"
    assert done.stdout.splitlines()[-len(NAMES) :] == expected
