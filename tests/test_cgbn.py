"""CGBN against a plain batch norm over the group's concatenated batch.

1. One process: settings, checkpoints, hosts.
2. 2 and 4 gloo ranks, in groups of 1, 2 and 4, with unequal image sizes.
"""

import copy
import itertools
import os

import pytest
import torch
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mmagvm.engine.hook import useless_sync_bn
from mmagvm.recipes.cgbn import (
    CGBN,
    group_batch_norm,
    possible_group_sizes,
    rank_group,
    sync_batch_norm,
)

CHANNELS = 3
#: Images per rank, and height and width on each of up to 4 ranks.
SHAPES = {
    'equal': (2, [(5, 4)] * 4),
    'unequal': (2, [(5, 4), (3, 7), (1, 1), (6, 2)]),
    'one image': (1, [(4, 4), (2, 3), (5, 1), (1, 2)]),
}
#: Ranks in a group, shapes, further options of the layer.
SCENARIOS = [
    (group, shapes, options)
    for group, shapes in itertools.product((1, 2, 4), SHAPES)
    for options in (
        dict(),
        dict(momentum=None, eps=1e-3),
        dict(affine=False),
        dict(track_running_stats=False),
    )
    if shapes == 'unequal' or not options
]
RANKS = (2, 4)
#: The layer is used this often before it is compared.
FORWARDS = 2


# -- one process


def plain_input(rank, forward, shapes):
    images, sizes = SHAPES[shapes]
    generator = torch.Generator().manual_seed(10 * forward + rank)
    shape = images, CHANNELS, *sizes[rank]
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return 100 * rank + values * (rank + 1)  # another mean on every rank


def with_some_weights(layer):
    if layer.affine:
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([0.5, -2, 3]))
            layer.bias.copy_(torch.tensor([7.0, 0, -1]))
    return layer.double()


def some_loss(output):
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype)
    return (output.sin() * weights.to(output.device).view_as(output)).sum()


def test_one_process_normalizes_its_own_batch():
    inputs = plain_input(0, 0, 'equal')
    layers = nn.BatchNorm2d(CHANNELS).double(), CGBN(CHANNELS, 16).double()
    for _ in range(2):
        plain, ours = (layer(inputs) for layer in layers)
        assert torch.equal(plain, ours)
        for name, value in layers[0].state_dict().items():
            assert torch.equal(layers[1].state_dict()[name], value)
        for layer in layers:
            layer.eval()


def test_checkpoints_are_those_of_batch_norm():
    plain, ours = nn.BatchNorm2d(CHANNELS), CGBN(CHANNELS, bn_size=16)
    assert list(plain.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(plain.state_dict())
    plain.load_state_dict(ours.state_dict())


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_hosts_build_it(scope):
    from mmcv.cnn import build_norm_layer

    cfg = dict(type='CGBN', bn_size=16, requires_grad=False)
    with MODELS.switch_scope_and_registry(scope):
        name, layer = build_norm_layer(cfg, 8, postfix=1)
    assert name == 'bn1'  # ResNet's checkpoints name it so
    assert isinstance(layer, CGBN) and layer.bn_size == 16
    assert not layer.weight.requires_grad


def test_resnet_takes_it_and_loads_a_plain_one():
    from mmdet.models import ResNet

    def build(norm_cfg):
        return ResNet(18, base_channels=8, norm_cfg=norm_cfg, norm_eval=False)

    plain = build(dict(type='BN'))
    ours = build(dict(type='CGBN', bn_size=16, requires_grad=True))
    ours.load_state_dict(plain.state_dict())
    inputs = torch.randn(2, 3, 32, 32)
    for expected, output in zip(plain(inputs), ours(inputs)):
        assert torch.equal(expected, output)
    copy.deepcopy(ours)
    revert_sync_batchnorm(ours)  # what mmdet does for inference on a CPU


@pytest.mark.parametrize(
    'options', [dict(bn_size=0), dict(bn_size='16'), dict(images_per_rank=-2)]
)
def test_senseless_setting_is_refused(options):
    with pytest.raises(ValueError, match=f'{[*options][0]}=.* write 1 or'):
        CGBN(CHANNELS, **{'bn_size': 16, **options})


def test_norm_eval_that_switches_it_off_is_reported():
    model = nn.ModuleDict(dict(backbone=nn.Sequential(CGBN(CHANNELS, 16))))
    assert useless_sync_bn(model) == []
    model['backbone'].norm_eval = True
    assert useless_sync_bn(model) == ['backbone']


def test_groups_stay_on_a_machine():
    assert possible_group_sizes(['a'] * 8) == [1, 2, 4, 8]
    assert possible_group_sizes(['a'] * 4 + ['b'] * 4) == [1, 2, 4]
    assert possible_group_sizes(['a'] * 6 + ['b'] * 6) == [1, 2, 3, 6]
    assert possible_group_sizes(['a', 'b', 'a', 'b']) == [1]
    assert possible_group_sizes(['a'] * 3 + ['b'] * 5) == [1]


# -- ranks


def plain_device():
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def use(layer, inputs, through=lambda layer, x: layer(x)):
    """The results of a layer in its last training use, and in evaluation."""
    for x in inputs:
        layer.zero_grad()
        x = x.clone().requires_grad_()
        output = through(layer, x)
        some_loss(output).backward()
    layer.eval()
    return dict(
        output=output.detach().cpu(),
        grad=x.grad.cpu(),
        **{f'{n}_grad': p.grad.cpu() for n, p in layer.named_parameters()},
        **{n: b.cpu().clone() for n, b in layer.named_buffers()},
        evaluated=layer(x).detach().cpu(),
    )


def run_scenario(rank, scenario):
    group, shapes, options = scenario
    layer = CGBN(CHANNELS, group * SHAPES[shapes][0], **options)
    return use(
        with_some_weights(layer).to(plain_device()),
        [
            plain_input(rank, forward, shapes).to(plain_device())
            for forward in range(FORWARDS)
        ],
    )


def expected_results(ranks, scenario):
    """The expected results of a group's ranks, from one process."""
    _, shapes, options = scenario
    layer = with_some_weights(nn.BatchNorm2d(CHANNELS, **options))
    gradients = [torch.zeros(CHANNELS, dtype=torch.float64) for _ in range(2)]
    for forward in range(FORWARDS):
        inputs = [plain_input(rank, forward, shapes) for rank in ranks]
        # images of unequal sizes, as pixels in a row
        rows = [x.transpose(0, 1).reshape(CHANNELS, -1) for x in inputs]
        row = torch.cat(rows, 1).requires_grad_()
        layer.zero_grad()
        outputs = layer(row.t()[..., None, None])[..., 0, 0].t()
        outputs = [
            part.view(CHANNELS, len(x), *x.shape[2:]).transpose(0, 1)
            for part, x in zip(
                outputs.split([r.size(1) for r in rows], 1), inputs
            )
        ]
        sum(some_loss(output) for output in outputs).backward()
    parts = row.grad.split([r.size(1) for r in rows], 1)
    gradients = {f'{n}_grad': p.grad for n, p in layer.named_parameters()}
    layer.eval()
    return gradients, [
        dict(
            output=output.detach(),
            grad=part.view(CHANNELS, len(x), *x.shape[2:]).transpose(0, 1),
            evaluated=layer(x).detach(),
            **dict(layer.named_buffers()),
        )
        for output, part, x in zip(outputs, parts, inputs)
    ]


def run_checkpointed(rank):
    """The scenario "equal, group 2", with activation checkpointing."""
    results = []
    for reentrant in (True, False):
        layer = with_some_weights(CGBN(CHANNELS, 4))
        inputs = [plain_input(rank, 0, 'equal')]
        results.append(
            use(
                layer,
                inputs,
                lambda layer, x, reentrant=reentrant: checkpoint(
                    layer, x, use_reentrant=reentrant
                ),
            )
        )
    results.append(
        use(
            with_some_weights(CGBN(CHANNELS, 4)),
            [plain_input(rank, 0, 'equal')],
        )
    )
    return results


def small_net(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 4, 3, bias=False),
        norm(4),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1, bias=False),
        norm(2),
    ).double()


def train_net(net, batches):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for batch in batches:
        optimizer.zero_grad()
        net(batch).sin().square().mean().backward()
        optimizer.step()
    return net


def run_net(rank, world_size):
    """Data-parallel training with one group of all ranks."""
    net = small_net(lambda channels: CGBN(channels, 2 * world_size))
    ddp = DistributedDataParallel(net, broadcast_buffers=False)
    train_net(ddp, [plain_input(rank, i, 'equal') for i in range(3)])
    copy.deepcopy(net)  # as EMAHook does
    return net.state_dict()


def run_narrow(rank):
    """Group 2 in bfloat16: the output, and the running variance."""
    layer = CGBN(CHANNELS, 4)
    output = layer(plain_input(rank, 0, 'equal').bfloat16())
    return output, layer.running_var


def run_empty(rank, images, compiled):
    """Group 2: a usual batch, then one in which ranks have ``images``."""
    layer = with_some_weights(CGBN(CHANNELS, 4, images_per_rank=2))
    layer.to(plain_device())
    through = torch.compile(layer, backend='eager') if compiled else layer
    through(plain_input(rank, 0, 'equal').to(plain_device()))
    before = {n: v.cpu().clone() for n, v in layer.state_dict().items()}
    batch = torch.ones(images[rank % 2], CHANNELS, 1, 1, dtype=torch.float64)
    output = through(batch.to(plain_device()).requires_grad_())
    output.sum().backward()
    return (
        output.detach().cpu(),
        [before, {n: v.cpu() for n, v in layer.state_dict().items()}],
        [p.grad.cpu() for p in layer.parameters() if p.grad is not None],
    )


class Kernels:
    """Plain versions of kernels that torch has only on CUDA."""

    @staticmethod
    def batch_norm_stats(x, eps):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return mean, (var + eps).rsqrt()

    @staticmethod
    def batch_norm_gather_stats_with_counts(
        x, means, invstds, running_mean, running_var, momentum, eps, counts
    ):
        weights = counts[:, None]
        mean = (means * weights).sum(0) / counts.sum().clamp(min=1)
        squares = invstds**-2 - eps + (means - mean) ** 2
        total = (squares * weights).sum(0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(total / (counts.sum() - 1), momentum)
        return mean, (total / counts.sum() + eps).rsqrt()

    @staticmethod
    def batch_norm_elemt(x, weight, bias, mean, invstd, eps):
        shape = 1, -1, 1, 1
        normal = (x - mean.view(shape)) * invstd.view(shape)
        return normal * weight.view(shape) + bias.view(shape)

    @staticmethod
    def batch_norm_backward_reduce(grad, x, mean, invstd, weight, *_):
        dims, shape = (0, 2, 3), (1, -1, 1, 1)
        products = (grad * (x - mean.view(shape))).sum(dims)
        return grad.sum(dims), products, products * invstd, grad.sum(dims)

    @staticmethod
    def batch_norm_backward_elemt(
        grad, x, mean, invstd, weight, sums, products, counts
    ):
        shape, count = (1, -1, 1, 1), counts.sum()
        along = (products * invstd**2 / count).view(shape)
        rest = grad - (sums / count).view(shape)
        rest = rest - (x - mean.view(shape)) * along
        return rest * (invstd * weight).view(shape)


def run_kernels(rank):
    """A usual batch, then batches of few values, in both functions."""
    for name in vars(Kernels):
        if name.startswith('batch_norm'):
            setattr(torch, name, getattr(Kernels, name))
    found = []
    for function in (sync_batch_norm, group_batch_norm):
        layer = with_some_weights(nn.BatchNorm2d(CHANNELS))
        found.append([])
        for images in ((2, 2), *FEW_VALUES):
            layer.zero_grad()
            x = plain_input(rank, 0, 'equal')[: images[rank % 2]]
            x = x[..., :1, :1] if images in FEW_VALUES else x
            x = x.clone().requires_grad_()
            output = function(
                *(x, layer.weight, layer.bias),
                *(layer.running_mean, layer.running_var, layer.eps, 0.1),
                *(rank_group(2), 2),
            )
            some_loss(output).backward()
            found[-1] += [output.detach(), x.grad if len(x) else None]
            found[-1] += [b.clone() for b in layer.buffers()]
            found[-1] += [p.grad for p in layer.parameters() if len(x)]
    return found


#: Of the ranks of a group, images of one value each.
FEW_VALUES = [(0, 0), (0, 1)]
REFUSALS = {
    'no multiple': (dict(bn_size=3), None, [2] * 4),
    'larger than a machine': (dict(bn_size=8), '2', [2] * 4),
    'no divisor of the ranks': (dict(bn_size=6), None, [2] * 4),
    'smaller than a rank': (dict(bn_size=1), None, [2] * 4),
    'unequal batches': (dict(bn_size=4), None, [2, 2, 3, 2]),
    'explicit': (dict(bn_size=4, images_per_rank=3), None, [2] * 4),
    'empty': (dict(bn_size=4), None, [0] * 4),
    'given': (dict(bn_size=4, images_per_rank=2), '2', [2, 5, 3, 2]),
}


def run_refusals(rank):
    messages = {}
    for name, (options, local, images) in REFUSALS.items():
        os.environ.pop('LOCAL_WORLD_SIZE', None)
        if local:
            os.environ['LOCAL_WORLD_SIZE'] = local
        layer = CGBN(CHANNELS, **options)
        try:
            layer(torch.randn(images[rank], CHANNELS, 2, 2))
            messages[name] = None
        except ValueError as error:
            messages[name] = str(error)
    os.environ.pop('LOCAL_WORLD_SIZE', None)
    return messages


def run_all(rank, world_size):
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    results = {
        repr(scenario): run_scenario(rank, scenario)
        for scenario in SCENARIOS
        if scenario[0] <= world_size
    }
    results['checkpointed'] = run_checkpointed(rank)
    results['net'] = run_net(rank, world_size)
    results['narrow'] = run_narrow(rank)
    results['few values'] = {
        (images, compiled): run_empty(rank, images, compiled)
        for images in FEW_VALUES
        for compiled in (False, True)
    }
    if not torch.cuda.is_available():
        results['kernels'] = run_kernels(rank)  # last, as it changes torch
    if world_size == 4:
        results['refusals'] = run_refusals(rank)
    return results


@pytest.fixture(scope='module', params=RANKS, ids=lambda n: f'{n}-ranks')
def results(request):
    return run_ranks(request.param, run_all)


@pytest.mark.parametrize('scenario', SCENARIOS, ids=str)
def test_group_equals_its_concatenated_batch(results, scenario):
    group = scenario[0]
    if group > len(results):
        pytest.skip('more ranks than there are')
    for first in range(0, len(results), group):
        ranks = range(first, first + group)
        gradients, expected = expected_results(ranks, scenario)
        for rank, values in zip(ranks, expected):
            ours = results[rank][repr(scenario)]
            for name, value in values.items():
                torch.testing.assert_close(
                    ours[name], value, rtol=1e-9, atol=1e-9, msg=name
                )
        for name, gradient in gradients.items():
            total = sum(results[r][repr(scenario)][name] for r in ranks)
            torch.testing.assert_close(
                total, gradient, rtol=1e-9, atol=1e-9, msg=name
            )


def test_checkpointed_activations_have_the_same_gradients(results):
    for *checkpointed, plain in (r['checkpointed'] for r in results):
        for values in checkpointed:
            for name in ('output', 'grad', 'weight_grad', 'bias_grad'):
                torch.testing.assert_close(values[name], plain[name])


def test_data_parallel_training_equals_one_process(results):
    net = small_net(nn.BatchNorm2d)
    batches = [
        torch.cat([plain_input(r, i, 'equal') for r in range(len(results))])
        for i in range(3)
    ]
    for name, value in train_net(net, batches).state_dict().items():
        for ours in (r['net'] for r in results):
            torch.testing.assert_close(ours[name], value, msg=name)


def test_bfloat16_is_summed_in_float32(results):
    inputs = [plain_input(r, 0, 'equal').bfloat16() for r in (0, 1)]
    layer = nn.BatchNorm2d(CHANNELS)
    output = layer(torch.cat(inputs).float())
    for rank, (ours, var) in enumerate(r['narrow'] for r in results[:2]):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(
            ours.float(), output[2 * rank : 2 * rank + 2], rtol=0.01, atol=0.01
        )
        torch.testing.assert_close(var, layer.running_var)


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize('images', FEW_VALUES)
def test_too_few_values_leave_running_statistics(results, images, compiled):
    """They stay as in BatchNorm2d, which also counts an empty batch."""
    plain = with_some_weights(nn.BatchNorm2d(CHANNELS))
    plain(torch.cat([plain_input(r, 0, 'equal') for r in (0, 1)]))
    plain(torch.ones(0, CHANNELS, 1, 1, dtype=torch.float64))
    for rank, found in enumerate(r['few values'] for r in results):
        output, (before, after), grads = found[images, compiled]
        assert output.shape == (images[rank % 2], CHANNELS, 1, 1)
        # one value is its own mean
        assert torch.equal(
            output, after['bias'].view(1, -1, 1, 1) + output * 0
        )
        for name in ('running_mean', 'running_var'):
            assert torch.equal(before[name], after[name])
            if rank < 2:
                torch.testing.assert_close(
                    after[name], plain.state_dict()[name]
                )
        assert torch.equal(
            after['num_batches_tracked'], plain.num_batches_tracked
        )
        for grad in grads:
            assert grad.isfinite().all()


def test_torchs_function_keeps_running_statistics_too(results):
    if torch.cuda.is_available():
        pytest.skip('all of this file is by its kernels here')
    for sync, ours in (r['kernels'] for r in results):
        assert len(sync) == len(ours)
        for theirs, expected in zip(sync, ours):
            torch.testing.assert_close(theirs, expected)


def test_impossible_groups_are_refused_on_all_ranks(results):
    if len(results) != 4:
        pytest.skip('for 4 ranks')
    first, *others = (r['refusals'] for r in results)
    assert all(other == first for other in others)
    assert first.pop('given') is None
    for name, message in first.items():
        setting = f'bn_size={REFUSALS[name][0]["bn_size"]} in norm_cfg'
        assert message.startswith(setting), message
    assert 'write one of 2, 4, 8, or' in first['no multiple']
    assert 'write one of 2, 4, or' in first['larger than a machine']
    assert 'write one of 3, 6, 12, or' in first['explicit']
    assert 'write images_per_rank=N' in first['unequal batches']
    assert 'write images_per_rank=N' in first['empty']
