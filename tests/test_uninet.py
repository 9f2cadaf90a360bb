"""UniNet: sizes, attention, checkpointing, freezing, wrong settings."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from mmengine.registry import MODELS
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mmagvm.engine.shard_units import find_units
from mmagvm.models import UniNet
from mmagvm.models.uninet_blocks import (
    DSM,
    Attention,
    ConvBlock,
    SqueezeExcitation,
    TransformerBlock,
)

# with both package sets
pytestmark = pytest.mark.host


def stage(block, expansion, channels, depth, stride, **windows):
    return dict(
        block=block,
        expansion=expansion,
        channels=channels,
        depth=depth,
        stride=stride,
        **windows,
    )


#: All kinds of blocks, strides and windows of UniNet-G; 0.2 M parameters.
ARCH = dict(
    stem=8,
    stages=[
        stage('fused_mbconv', 1, 16, 2, 1),
        stage('fused_mbconv', 4, 24, 2, 2),
        stage('mbconv', 3, 32, 2, 2),
        stage('transformer', 2, 32, 3, 1, windows=(4, 4, 0)),
        stage('transformer', 3, 64, 3, 2, windows=(2, 2, 0)),
    ],
)
SMALL = dict(arch=ARCH, head_dim=16, layer_scale=1.0, out_indices=(1, 3, 4))


def build(**settings):
    torch.manual_seed(0)
    model = UniNet(**{**SMALL, **settings})
    for module in model.modules():
        # a block that starts as the identity would hide its computation
        if isinstance(module, ConvBlock):
            nn.init.ones_(module.layers[-1].weight)
    return model


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# Sizes: of AGVM's Table 4, United-Perception's MB15 and Sense-X/UniNet


@pytest.mark.parametrize(
    'with_se, millions, total',
    [
        (False, [0.56, 15.5, 153.6, 174.2, 48.0, 653.7], 1045.5),
        (True, [0.58, 18.5, 199.6, 200.3, 48.0, 653.7], 1120.7),
    ],
)
def test_uninet_g_has_as_many_parameters(with_se, millions, total):
    with torch.device('meta'):
        model = UniNet(with_se=with_se)
    counts = [count(part) for part in model.stages]
    counts[0] += count(model.stem)
    for found, expected in zip(counts, millions):
        digits = 2 if expected < 1 else 1
        assert round(found / 1e6, digits) == expected
    assert round(count(model) / 1e6, 1) == total
    assert sum(counts) == count(model)


@pytest.mark.parametrize('with_se, millions', [(False, 1080), (True, 1158)])
def test_uninet_g_with_modules_between_stages(with_se, millions):
    with torch.device('meta'):
        model = UniNet(with_se=with_se, transition='dsm')
    assert round(count(model) / 1e6) == millions


@pytest.mark.parametrize('with_se, millions', [(False, 772), (True, 847)])
def test_uninet_g_of_depthwise_convolutions(with_se, millions):
    with torch.device('meta'):
        stages = [
            stage('mbconv', 1, 104, 6, 1),
            stage('mbconv', 4, 216, 9, 2),
            stage('mbconv', 6, 384, 18, 2),
            stage('mbconv', 3, 576, 18, 2),
            stage('transformer', 2, 576, 18, 1),
            stage('transformer', 5, 1152, 36, 2),
        ]
        model = UniNet(dict(stem=64, stages=stages), with_se)
    assert round(count(model) / 1e6) == millions


def test_uninet_b1_has_as_many_parameters():
    with torch.device('meta'):
        model = UniNet('B1', transition='dsm', head_dim=32)
    # 11.451 M is of the classifier: conv1x1, BN and a layer for 1000 classes
    head = 256 * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    assert round((count(model) + head) / 1e6, 3) == 11.451


def test_windows_of_uninet_g():
    with torch.device('meta'):
        stages = UniNet().stages
    windows = [[b.attention.window for b in s] for s in stages[4:]]
    assert windows == [[28, 28, 0] * 6, [14, 14, 0] * 12]
    heads = [b.attention.qkv.in_features // 64 for b in stages[5][:2]]
    assert heads == [9, 18]


def test_squeezed_channels_are_a_multiple_of_8():
    found = [
        SqueezeExcitation(channels).squeeze.out_channels
        for channels in (8, 64, 104, 1296, 76)
    ]
    # 26 to 24, 324 to 328; 19 to 24, as 16 would be a tenth less
    assert found == [8, 16, 24, 328, 24]


# Outputs


@pytest.mark.parametrize('transition', ['block', 'dsm'])
@pytest.mark.parametrize('size', [(33, 70), (64, 48), (5, 3)])
def test_outputs_have_the_size_of_their_stride(transition, size):
    model = build(transition=transition)
    outputs = model(torch.randn(2, 3, *size))
    for output, channels, stride in zip(outputs, (24, 32, 64), (4, 8, 16)):
        sides = [-(-side // stride) for side in size]
        assert output.shape == (2, channels, *sides)
    assert len(outputs) == 3


def test_outputs_of_uninet_g_are_of_the_pyramid():
    with torch.device('meta'):
        outputs = UniNet()(torch.empty(1, 3, 96, 64))
    assert [tuple(output.shape[1:]) for output in outputs] == [
        (384, 12, 8),
        (576, 6, 4),
        (1152, 3, 2),
    ]


def test_stages_that_nothing_reads_are_not_built():
    model = build(out_indices=(0, 2))
    assert len(model.stages) == 3
    assert len(model(torch.randn(2, 3, 16, 16))) == 2


@pytest.mark.parametrize('transition', ['block', 'dsm'])
@pytest.mark.parametrize('with_se', [False, True])
def test_every_parameter_gets_a_gradient(transition, with_se):
    model = build(transition=transition, with_se=with_se)
    assert count(model) < 5e5
    outputs = model(torch.randn(2, 3, 32, 40))
    sum(output.square().mean() for output in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_new_convolutional_block_is_its_shortcut():
    block = ConvBlock(8, 8, 4)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x)


def test_a_new_transformer_block_is_nearly_its_position():
    block = TransformerBlock(32, 32, 2, head_dim=16)
    x = torch.randn(2, 32, 5, 5)
    torch.testing.assert_close(
        block(x), x + block.position(x), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    'fused, expansion, stride, layers',
    [
        (True, 1, 1, 'SE conv3 BN'),
        (True, 4, 2, 'BN conv3 BN GELU SE conv1 BN'),
        (False, 1, 1, 'dw3 BN GELU SE conv1 BN'),
        (False, 4, 2, 'BN conv1 BN GELU dw3 BN GELU SE conv1 BN'),
    ],
)
def test_layers_of_a_convolutional_block(fused, expansion, stride, layers):
    block = ConvBlock(8, 8, expansion, stride, fused)
    names = {
        nn.BatchNorm2d: lambda layer: 'BN',
        nn.GELU: lambda layer: 'GELU',
        SqueezeExcitation: lambda layer: 'SE',
        nn.Conv2d: lambda layer: (
            f'{"dw" if layer.groups > 1 else "conv"}{layer.kernel_size[0]}'
        ),
    }
    found = [names[type(layer)](layer) for layer in block.layers]
    assert found == layers.split()
    strides = [
        layer.stride[0] for layer in block.layers if hasattr(layer, 'stride')
    ]
    # it is the 3x3 convolution that skips pixels
    place = [n for n in found if n[-1].isdigit()].index(
        'conv3' if fused else 'dw3'
    )
    assert strides.pop(place) == stride
    assert set(strides) <= {1}


# Attention


def slow_attention(module, x):
    """Of every head of all pixels in ``x``, (H, W, C)."""
    pixels = x.reshape(-1, x.shape[-1])
    q, k, v = (pixels @ module.qkv.weight.T + module.qkv.bias).chunk(3, -1)
    heads = []
    for first in range(0, x.shape[-1], module.head_dim):
        part = slice(first, first + module.head_dim)
        scores = q[:, part] @ k[:, part].T / module.head_dim**0.5
        heads.append(scores.softmax(-1) @ v[:, part])
    seen = torch.cat(heads, -1) @ module.out.weight.T + module.out.bias
    return seen.view(*x.shape[:2], -1)


@pytest.mark.parametrize('size', [(8, 12), (7, 9), (3, 2)])
def test_attention_in_windows(size):
    torch.manual_seed(0)
    module = Attention(16, 24, 8, window=4)
    nn.init.normal_(module.qkv.bias)  # which makes pads be seen
    x = torch.randn(2, *size, 16)
    expected = torch.empty(2, *size, 24)
    for image in range(2):
        for top in range(0, size[0], 4):
            for left in range(0, size[1], 4):
                place = image, slice(top, top + 4), slice(left, left + 4)
                inside = x[place]
                window = torch.zeros(4, 4, 16)
                height, width = inside.shape[:2]
                window[:height, :width] = inside
                seen = slow_attention(module, window)
                expected[place] = seen[:height, :width]
    torch.testing.assert_close(module(x), expected)


def test_attention_to_all_pixels():
    torch.manual_seed(0)
    module = Attention(16, 24, 8)
    x = torch.randn(2, 5, 7, 16)
    expected = torch.stack([slow_attention(module, image) for image in x])
    torch.testing.assert_close(module(x), expected)


def test_a_transformer_block_that_changes_channels():
    torch.manual_seed(0)
    block = TransformerBlock(16, 24, 5, 2, head_dim=8, layer_scale=0.5)
    x = torch.randn(1, 16, 7, 6)
    placed = x + block.position(x)
    pool, project = block.shortcut
    normed = block.attention_norm(placed.permute(0, 2, 3, 1))
    pooled = F.max_pool2d(normed.permute(0, 3, 1, 2), 3, 2, 1)
    seen = slow_attention(block.attention, pooled[0].permute(1, 2, 0))
    expected = project(pool(placed))[0] + 0.5 * seen.permute(2, 0, 1)
    torch.testing.assert_close(block(x)[0], expected)
    assert not any('mlp' in name for name, _ in block.named_parameters())


def test_a_local_global_module():
    torch.manual_seed(0)
    module = DSM(16, 24, 2, 8, dict(type='BN'))
    x = torch.randn(1, 16, 5, 6)
    expected = module.shortcut(x)
    query = module.query_norm(module.local(x).flatten(2)[0].T)
    pixels = module.norm(x.flatten(2)[0].T)
    k, v = (pixels @ module.kv.weight.T + module.kv.bias).chunk(2, -1)
    heads = [
        ((q @ k.T) / 8**0.5).softmax(-1) @ v
        for q, k, v in zip(*(t.split(8, -1) for t in (query, k, v)))
    ]
    seen = module.out(torch.cat(heads, -1)).T.view(1, 24, 3, 3)
    torch.testing.assert_close(module(x), expected + seen)
    kinds = [type(part) for part in module.shortcut]
    assert kinds == [nn.MaxPool2d, nn.Conv2d]
    assert type(DSM(16, 24, 1, 8, dict(type='BN')).shortcut) is nn.Conv2d


# Checkpointing


def step(model, backwards=1):
    """Gradients and buffers after a training step."""
    model.train()
    torch.manual_seed(1)
    loss = sum(o.square().mean() for o in model(torch.randn(2, 3, 32, 40)))
    for _ in range(backwards):
        model.zero_grad()
        loss.backward(retain_graph=True)
    return (
        {name: p.grad for name, p in model.named_parameters()},
        {name: b.clone() for name, b in model.named_buffers()},
    )


@pytest.mark.parametrize('momentum', [0.1, None])
@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(transition='dsm'),
        dict(drop_path_rate=0.5),
        dict(norm_cfg=dict(type='CGBN', bn_size=2)),
        dict(frozen_stages=2),
    ],
    ids=str,
)
def test_checkpointing_changes_nothing(settings, momentum):
    norm_cfg = settings.get('norm_cfg', dict(type='BN'))
    settings = {**settings, 'norm_cfg': {**norm_cfg, 'momentum': momentum}}
    plain = step(build(**settings))
    for backwards in (1, 2):
        kept = step(build(**settings, with_cp=True), backwards)
        for expected, found in zip(plain, kept):
            assert expected.keys() == found.keys()
            for name, value in expected.items():
                if value is None:
                    assert found[name] is None
                else:
                    assert torch.equal(found[name], value), name


def test_checkpointing_keeps_less():
    def kept(**settings):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        model = build(**settings)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(torch.randn(2, 3, 32, 40))
        return sum(sizes)

    assert kept(with_cp=True) < kept() / 3


def test_checkpointing_computes_blocks_again():
    model = build(with_cp=True)
    calls = []
    for module in model.modules():
        if isinstance(module, (ConvBlock, TransformerBlock)):
            module.register_module('count', nn.Identity())
            compute = module.compute
            module.compute = lambda x, compute=compute: (
                calls.append(1) or compute(x)
            )
    step(model)
    assert len(calls) == 2 * sum(map(len, model.stages))


def step_on_rank(rank, world_size, settings, sharded):
    model = build(norm_cfg=dict(type='CGBN', bn_size=4), **settings)
    if sharded:
        for blocks in model.stages:
            for block in blocks:
                fully_shard(block)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    torch.manual_seed(rank)
    x = torch.randn(2, 3, 32, 40)
    sum(output.square().mean() for output in model(x)).backward()
    values = {name: p.grad for name, p in model.named_parameters()}
    values.update(model.named_buffers())
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in values.items()
    }


@pytest.mark.slow  # starts processes
@pytest.mark.parametrize('sharded', [False, True])
def test_checkpointing_changes_nothing_on_ranks(sharded):
    plain = run_ranks(2, step_on_rank, {}, sharded)
    kept = run_ranks(2, step_on_rank, dict(with_cp=True), sharded)
    for expected, found in zip(plain, kept):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


# Training and evaluation


def test_drop_path_is_off_in_evaluation():
    model = build(drop_path_rate=0.5)
    x = torch.randn(2, 3, 32, 32)
    model.eval()
    first, plain = model(x)[-1], build().eval()(x)[-1]
    assert torch.equal(first, model(x)[-1])
    assert torch.equal(first, plain)
    model.train()
    assert not torch.equal(model(x)[-1], model(x)[-1])


def test_drop_path_grows_evenly():
    model = build(drop_path_rate=0.22)
    rates = [
        block.drop_path.drop_prob
        for blocks in model.stages
        for block in blocks
        if hasattr(block, 'drop_path')
    ]
    # 12 blocks; that of index 9 changes channels and has none
    expected = [0.02 * place for place in range(12) if place != 9]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize('transition', ['block', 'dsm'])
def test_frozen_stages(transition):
    model = build(frozen_stages=2, transition=transition)
    gradients, buffers = step(model)
    frozen = tuple(
        ('stem.', 'stages.0.', 'stages.1.', 'transitions.0.', 'transitions.1.')
    )
    for name, gradient in gradients.items():
        assert (gradient is None) == name.startswith(frozen), name
    for name, buffer in buffers.items():
        if name.endswith('num_batches_tracked'):
            assert (buffer == 0) == name.startswith(frozen), name


def test_the_stem_alone_is_frozen():
    gradients, _ = step(build(frozen_stages=0))
    for name, gradient in gradients.items():
        assert (gradient is None) == name.startswith('stem.'), name


def test_norms_in_evaluation():
    model = build(norm_eval=True)
    _, buffers = step(model)
    assert model.training
    assert all(
        buffer == 0
        for name, buffer in buffers.items()
        if name.endswith('num_batches_tracked')
    )


# In MMEngine


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg'])
def test_it_is_built_in_any_scope(scope):
    registry = pytest.importorskip(f'{scope}.registry').MODELS
    model = registry.build(dict(type='UniNet', **SMALL))
    assert type(model) is UniNet
    model.init_weights()
    assert registry.get('UniNet') is MODELS.get('UniNet')


@pytest.mark.parametrize('transition', ['block', 'dsm'])
def test_each_block_is_a_unit_of_shards(transition):
    detector = nn.Module()
    detector.backbone = build(transition=transition)
    expected = [
        f'backbone.stages.{index}.{place}'
        for index, blocks in enumerate(detector.backbone.stages)
        for place in range(len(blocks))
    ]
    if transition == 'dsm':
        expected += [f'backbone.transitions.{index}' for index in range(1, 5)]
    assert sorted(find_units(detector)) == sorted(expected)


def test_each_transformer_block_of_uninet_g_is_a_unit_of_shards():
    detector = nn.Module()
    with torch.device('meta'):
        detector.backbone = UniNet(with_se=False)
    units = find_units(detector)
    # the small blocks of stage 0 are two layers each: together they are one
    assert len(units) == 1 + 9 + 18 + 18 + 18 + 36
    assert 'backbone.stages.0' in units


# Wrong settings


def changed(index, **sizes):
    stages = [dict(sizes) for sizes in ARCH['stages']]
    stages[index].update(sizes)
    return dict(stem=8, stages=stages)


@pytest.mark.parametrize(
    'settings, named',
    [
        (dict(arch='H'), "arch='H'.*'G', 'B1'"),
        (dict(arch=dict(stem=8)), r"arch .*\['stem'\].*stages="),
        (dict(arch=dict(stem=8, stages=[])), 'arch .*stages='),
        (dict(arch=dict(ARCH, stem=0)), 'stem=0.*such as 64'),
        (dict(arch=changed(0, width=3)), "'width'.*block, expansion"),
        (dict(arch=changed(0, block='conv')), "block='conv'.*'transformer'"),
        (dict(arch=changed(1, depth=0)), 'depth=0.*1 or more'),
        (dict(arch=changed(1, channels=2.5)), 'channels=2.5.*1 or more'),
        (dict(arch=changed(1, stride=4)), 'stride=4.*1 or 2'),
        (
            dict(arch=changed(1, windows=(4,))),
            r'windows=\(4,\).*leave windows out',
        ),
        (dict(arch=changed(3, windows=())), r'windows=\(\).*such as'),
        (dict(arch=changed(3, windows=(-1,))), r'windows=\(-1,\).*such as'),
        (dict(head_dim=24), 'head_dim=24.*32 channels.*divisor'),
        (dict(head_dim=0), 'head_dim=0.*divisor'),
        (dict(transition='conv'), "transition='conv'.*'block' nor 'dsm'"),
        (dict(drop_path_rate=1.0), 'drop_path_rate=1.0.*such as 0.3'),
        (dict(out_indices=()), r'out_indices=\(\).*0 to 4'),
        (dict(out_indices=(1, 5)), r'out_indices=\(1, 5\).*0 to 4'),
        (dict(frozen_stages=6), 'frozen_stages=6.*-1 for none.*5 stages'),
        (dict(frozen_stages=-2), 'frozen_stages=-2.*-1 for none'),
    ],
)
def test_wrong_settings_are_reported(settings, named):
    with pytest.raises(ValueError, match=named) as error:
        UniNet(**{**SMALL, **settings})
    assert 'UniNet' in str(error.value)
    assert '\n' not in str(error.value)
