"""RCNet and SEPC against plain references."""

import math

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.structures import InstanceData
from torch import nn
from torch.nn import functional

import mmagvm.models.rcnet  # noqa: F401  registers RCNet
import mmagvm.models.sepc  # noqa: F401  registers SEPC
from mmagvm.models.pyramid import Conv3x3
from mmagvm.models.rcnet import (
    ContextPool,
    CrossScaleShift,
    GatedNode,
    RCNet,
    RevFP,
)
from mmagvm.models.sepc import SEPC, IntegratedBatchNorm, PConv

# with both package sets
pytestmark = pytest.mark.host

PLAIN = dict(conv_cfg=None, norm_cfg=None, act_cfg=None)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pyramid(channels, height, width, levels, images=2):
    """Random levels, each of half the sides of the one before."""
    made = []
    for _ in range(levels):
        made.append(torch.randn(images, channels, height, width))
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    return made


def shapes(levels):
    return [tuple(level.shape) for level in levels]


def randomize(module):
    """Make parameters that start at zero random."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@pytest.mark.parametrize('conv', ['DCN', 'DCNv2', None])
@pytest.mark.parametrize('num_outs', [3, 4, 5, 6])
def test_shapes_from_odd_sizes(num_outs, conv):
    conv_cfg = conv and dict(type=conv)
    inputs = [
        torch.randn(2, channels, *size)
        for channels, size in zip((3, 4, 5), ((37, 22), (19, 11), (10, 6)))
    ]
    expected = shapes(pyramid(8, 37, 22, num_outs))
    outs = RCNet([3, 4, 5], 8, num_outs, conv_cfg=conv_cfg)(inputs)
    assert isinstance(outs, tuple)
    assert shapes(outs) == expected
    outs = SEPC(8, 8, num_convs=2, conv_cfg=conv_cfg)(outs)
    assert isinstance(outs, tuple)
    assert shapes(outs) == expected


@pytest.mark.parametrize('rest', [1, 2, 3])
def test_shapes_of_levels_below_the_kernel(rest):
    inputs = pyramid(4, 4, rest, 3)
    outs = RCNet([4, 4, 4], 8, 6)(inputs)
    expected = shapes(pyramid(8, 4, rest, 6))
    assert shapes(outs) == expected
    assert shapes(SEPC(8, 8)(outs)) == expected


def test_settings_of_rcnets_own_code():
    neck = RCNet(
        [4, 4, 4],
        16,
        5,
        num_stages=1,
        num_fused=5,
        shift_divisor=16,
        shift_reach=2,
        pool_size=2,
        conv_cfg=dict(type='DCNv2', deform_groups=2),
    )
    assert len(neck.shift.mixers) == len(neck.stages[0].nodes) == 5
    assert neck.shift.mixers[0][0].in_channels == 20
    outs = neck(pyramid(4, 21, 13, 3))
    assert shapes(outs) == shapes(pyramid(16, 21, 13, 5))


def test_start_level_leaves_finer_levels_out():
    neck = RCNet([2, 4, 4, 4], 8, 5, start_level=1)
    inputs = [torch.full((1, 2, 40, 40), math.nan), *pyramid(4, 20, 20, 3, 1)]
    outs = neck.eval()(inputs)
    assert shapes(outs) == shapes(pyramid(8, 20, 20, 5, 1))
    assert all(out.isfinite().all() for out in outs)


def test_levels_that_round_down():
    inputs = [torch.randn(1, 4, size, size) for size in (21, 10, 5)]
    outs = RCNet([4, 4, 4], 8, 4)(inputs)
    assert [out.size(-1) for out in outs] == [21, 10, 5, 3]
    assert [out.size(-1) for out in SEPC(8, 8)(outs)] == [21, 10, 5, 3]


def test_further_levels_activate_what_is_not_the_backbones():
    neck = RCNet([4, 4, 4], 8, 6)
    assert [type(extra.act) for extra in neck.extras] == [
        nn.Identity,
        nn.ReLU,
        nn.ReLU,
    ]
    assert [extra.stride for extra in neck.extras] == [2, 2, 2]


def test_node_begins_with_halves():
    x, upper, lower = torch.randn(3, 2, 4, 6, 5)
    node = GatedNode(4, True, False, **PLAIN)
    torch.testing.assert_close(node(x, upper, None), node.out((x + upper) / 2))
    node = GatedNode(4, False, True, **PLAIN)
    torch.testing.assert_close(node(x, None, lower), node.out((x + lower) / 2))
    node = GatedNode(4, True, True, **PLAIN)
    torch.testing.assert_close(
        node(x, upper, lower),
        node.out((node.between((x + upper) / 2) + lower) / 2),
    )


def slow_gate(gate, x, z):
    """One number for each image."""
    means = torch.cat([x.mean((1, 2)), z.mean((1, 2))])
    return 1 / (
        1 + math.exp(-float(gate.weight[0, :, 0, 0] @ means) - gate.bias)
    )


def slow_node(node, x, upper, lower):
    """Of one image, (C, H, W), by the formulas."""
    channels, height, width = x.shape
    both = functional.pad(torch.cat([x, upper]), (1, 1, 1, 1))
    kernel = node.attention.weight[0]
    scores = {
        (i, j): float(
            node.temperature
            * (kernel * both[:, i : i + 3, j : j + 3]).sum()
            / math.sqrt(channels)
        )
        for i in range(height)
        for j in range(width)
    }
    total = sum(math.exp(score) for score in scores.values())
    attended = upper.clone()
    for (i, j), score in scores.items():
        attended[:, i, j] *= height * width * math.exp(score) / total
    weight = slow_gate(node.upper_gate, x, upper)
    y = node.between((weight * x + (1 - weight) * attended)[None])[0]
    weight = slow_gate(node.lower_gate, y, lower)
    return node.out((weight * y + (1 - weight) * lower)[None])[0]


@torch.no_grad()
def test_node_against_the_formulas():
    node = randomize(GatedNode(4, True, True, **PLAIN))
    x, upper, lower = torch.randn(3, 2, 4, 6, 5)
    expected = torch.stack(
        [slow_node(node, *each) for each in zip(x, upper, lower)]
    )
    torch.testing.assert_close(
        node(x, upper, lower), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize('pool_size', [2, 3])
def test_revfp_joins_from_the_finest_level_on(pool_size):
    stage = RevFP(4, 3, pool_size, **PLAIN)
    low, middle, top = pyramid(4, 7, 6, 3)

    def up(x, like):
        return functional.interpolate(x, like.shape[-2:], mode='bilinear')

    def down(x):
        if pool_size == 3:
            return functional.max_pool2d(x, 3, 2, 1)
        right, below = x.size(-1) % 2, x.size(-2) % 2
        x = functional.pad(x, (0, right, 0, below), mode='replicate')
        return functional.max_pool2d(x, 2)

    first = stage.nodes[0](low, up(middle, low), None)
    second = stage.nodes[1](middle, up(top, middle), down(first))
    third = stage.nodes[2](top, None, down(second))
    for got, expected in zip(
        stage([low, middle, top]), (first, second, third)
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize('levels', [2, 3, 5])
@pytest.mark.parametrize('divisor, reach', [(8, 1), (16, 2), (4, 2)])
def test_shift_against_loops(levels, divisor, reach):
    channels, part = 16, 16 // divisor
    shift = CrossScaleShift(channels, levels, divisor, reach)
    x = torch.randn(2, levels, channels, 3, 2)
    got = shift.shifted(x)
    assert got.size(2) == channels + 2 * reach * part
    for level in range(levels):
        expected = []
        for place, step in enumerate((1, -1, 2, -2)[: 2 * reach]):
            for channel in range(place * part, (place + 1) * part):
                expected.append(x[:, (level + step) % levels, channel])
        expected.extend(x[:, level, channel] for channel in range(channels))
        assert torch.equal(got[:, level], torch.stack(expected, 1))


@torch.no_grad()
def test_contexts_are_the_sources_softmax_and_mean():
    pool = randomize(ContextPool(4))
    x = torch.randn(2, 4, 3, 5)
    attention = pool.attention(x).flatten(1).softmax(1) * 15
    weighted = x * attention.view(2, 1, 3, 5)
    torch.testing.assert_close(
        pool(x), pool.transform(functional.adaptive_avg_pool2d(weighted, 1))
    )


@torch.no_grad()
def test_cross_scale_shift_as_a_whole():
    shift = randomize(CrossScaleShift(8, 3, norm_cfg=None))
    levels = pyramid(8, 9, 7, 3)
    low, middle, top = levels
    size = middle.shape[-2:]
    x = [
        functional.adaptive_max_pool2d(low, size),
        middle,
        functional.interpolate(top, size, mode='bilinear'),
    ]
    wide = shift.shifted(torch.stack(x, 1))
    x = [each + shift.mixers[i](wide[:, i]) for i, each in enumerate(x)]
    means = torch.stack([each.mean((2, 3)) for each in x], 2)
    context = shift.scale_context(means[..., None])
    context = context + shift.pixel_context(sum(x) / 3)
    x = [each + context for each in x]
    expected = [
        low + functional.interpolate(x[0], low.shape[-2:], mode='bilinear'),
        middle + x[1],
        top + functional.adaptive_max_pool2d(x[2], top.shape[-2:]),
    ]
    for got, each in zip(shift(levels), expected):
        torch.testing.assert_close(got, each, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('norm', ['BN', 'SyncBN', 'CGBN'])
def test_integrated_norm_is_that_of_all_pixels(norm):
    kwargs = dict(bn_size=2) if norm == 'CGBN' else {}
    layer = IntegratedBatchNorm(4, dict(type=norm, **kwargs))
    levels = [3 * level + i for i, level in enumerate(pyramid(4, 7, 5, 4))]
    pixels = torch.cat(
        [level.transpose(0, 1).flatten(1) for level in levels], 1
    )
    mean, var = pixels.mean(1), pixels.var(1, unbiased=False)

    def normalized(mean, var):
        mean, var = mean.view(-1, 1, 1), var.view(-1, 1, 1)
        return [(level - mean) / (var + 1e-5).sqrt() for level in levels]

    def same(got, expected):
        for one, other in zip(got, expected):
            torch.testing.assert_close(one, other)

    same(layer(levels), normalized(mean, var))
    running = 0.1 * mean, 0.9 + 0.1 * pixels.var(1)
    same((layer.norm.running_mean, layer.norm.running_var), running)
    same(layer.eval()(levels), normalized(*running))


@pytest.mark.parametrize('levels', [1, 2, 4])
@pytest.mark.parametrize('conv_cfg', [None, dict(type='DCN')])
def test_pconv_against_three_convolutions(levels, conv_cfg):
    layer = PConv(4, 6, conv_cfg=conv_cfg, act_cfg=None)
    x = pyramid(4, 11, 6, levels)
    outs = []
    for i in range(levels):
        y = functional.conv2d(x[i], layer.same.conv.weight, padding=1)
        if i > 0:
            y = y + functional.conv2d(
                x[i - 1], layer.finer.conv.weight, stride=2, padding=1
            )
        if i + 1 < levels:
            coarser = layer.coarser.conv.weight
            y = y + functional.interpolate(
                functional.conv2d(x[i + 1], coarser, padding=1),
                y.shape[-2:],
                mode='bilinear',
                align_corners=True,
            )
        outs.append(y)
    for got, expected in zip(layer(x), layer.norm(outs)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_first_level_without_offsets():
    x = pyramid(4, 11, 6, 3)
    deformed = randomize(PConv(4, 4))
    plain = PConv(4, 4, plain_first_level=True)
    plain.load_state_dict(deformed.state_dict())
    deformed.norm.norm = plain.norm.norm = nn.Identity()
    first, *rest = plain(x)
    other_first, *same_rest = deformed(x)
    assert not torch.allclose(first, other_first, atol=0.1)
    assert all(torch.equal(one, other) for one, other in zip(rest, same_rest))
    for part in (deformed.coarser, deformed.same, deformed.finer):
        nn.init.zeros_(part.conv.conv_offset.weight)
        nn.init.zeros_(part.conv.conv_offset.bias)
    torch.testing.assert_close(deformed(x)[0], first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [(1, 1), (2, 1), (2, 5), (3, 3), (8, 7)])
def test_deformable_without_offsets_is_plain(size, stride):
    layer = Conv3x3(3, 4, stride, dict(type='DCN'))
    x = torch.randn(2, 3, *size)
    expected = functional.conv2d(
        x, layer.conv.weight, stride=stride, padding=1
    )
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x, plain=True), expected)


def test_order_is_activation_convolution_norm():
    layer = Conv3x3(3, 4, norm_cfg=dict(type='BN'), act_cfg=dict(type='ReLU'))
    x = torch.randn(2, 3, 6, 5)
    kept = x.clone()
    expected = layer.norm(layer.conv(x.relu()))
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(x, kept)


def test_layouts_that_mmcv_refuses():
    neck = SEPC(8, 8, num_convs=2, act_cfg=None)
    levels = pyramid(8, 8, 6, 3)
    outs = neck([x.to(memory_format=torch.channels_last) for x in levels])
    for got, expected in zip(outs, neck(levels)):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['DCN', 'DCNv2'])
def test_offsets_are_used_and_padding_adds_nothing(name):
    layer = randomize(Conv3x3(3, 4, 1, dict(type=name)))
    x = torch.randn(1, 3, 2, 2)
    larger = layer(functional.pad(x, (0, 4, 0, 4)))[..., :2, :2]
    torch.testing.assert_close(layer(x), larger)
    assert not torch.allclose(layer(x), layer(x, plain=True), atol=1e-2)


def test_deformable_convolution_in_mixed_precision():
    neck = nn.Sequential(RCNet([4, 4, 4], 8, 5), SEPC(8, 8))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outs = neck(pyramid(4, 17, 12, 3))
        sum(out.square().sum() for out in outs).backward()
    assert all(p.grad.isfinite().all() for p in neck.parameters())


@pytest.mark.parametrize(
    'neck',
    [
        dict(
            type='RCNet',
            in_channels=[8, 16, 32, 64],
            out_channels=8,
            start_level=1,
            num_outs=5,
        ),
        [
            dict(
                type='FPN',
                in_channels=[8, 16, 32, 64],
                out_channels=8,
                start_level=1,
                add_extra_convs='on_output',
                num_outs=5,
            ),
            dict(type='SEPC', in_channels=8, out_channels=8),
        ],
        [
            dict(
                type='RCNet',
                in_channels=[8, 16, 32, 64],
                out_channels=8,
                start_level=1,
                num_outs=5,
            ),
            dict(type='SEPC', in_channels=8, out_channels=8),
        ],
    ],
    ids=['RCNet', 'FPN-SEPC', 'RCNet-SEPC'],
)
def test_in_a_detector(neck, tmp_path):
    file = tmp_path / 'config.py'
    file.write_text("_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'")
    cfg = Config.fromfile(file)
    cfg.model.backbone.update(
        base_channels=8, frozen_stages=-1, init_cfg=None, norm_eval=False
    )
    cfg.model.neck = neck
    cfg.model.bbox_head.update(in_channels=8, feat_channels=8, num_classes=2)
    with DefaultScope.overwrite_default_scope('mmdet'):
        init_default_scope('mmdet')
        model = MODELS.build(cfg.model)
    model.init_weights()
    for name, parameter in model.neck.named_parameters():
        if 'conv_offset' in name or '_gate' in name:
            assert not parameter.any(), name
    sample = DetDataSample(
        metainfo=dict(img_shape=(64, 96), pad_shape=(64, 96))
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[4.0, 5.0, 40.0, 50.0]]), labels=torch.tensor([1])
    )
    losses = model.loss(torch.randn(2, 3, 64, 96), [sample, sample])
    sum(sum(loss) for loss in losses.values()).backward()
    for name, parameter in model.neck.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        # attention begins at zero, and with it this gradient
        if 'temperature' not in name:
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    'change, sentence',
    [
        (
            dict(num_outs=2),
            'num_outs=2 of RCNet is too small or not an integer: '
            'write 3 or more',
        ),
        (
            dict(num_stages=0),
            'num_stages=0 of RCNet is too small or not an integer: '
            'write 1 or more',
        ),
        (
            dict(start_level=3),
            'start_level=3 of RCNet leaves none of the 3 levels of '
            'in_channels: write less',
        ),
        (
            dict(start_level=-1),
            'start_level=-1 of RCNet is too small or not an integer: '
            'write 0 or more',
        ),
        (
            dict(num_fused=2),
            'num_fused=2 of RCNet is too small or not an integer: '
            'write 3 or more',
        ),
        (
            dict(num_fused=6),
            'num_outs=5 of RCNet is too small or not an integer: '
            'write 6 or more',
        ),
        (
            dict(shift_divisor=3),
            'shift_divisor=3 of RCNet does not divide out_channels=8: write '
            'a divisor of it',
        ),
        (
            dict(shift_divisor=2, shift_reach=2),
            'shift_divisor=2 of RCNet is too small or not an integer: '
            'write 4 or more',
        ),
        (
            dict(shift_reach=0),
            'shift_reach=0 of RCNet is too small or not an integer: '
            'write 1 or more',
        ),
        (
            dict(pool_size=4),
            'pool_size=4 of RCNet is unknown: write 3 (padded) or 2',
        ),
    ],
)
def test_rcnet_refuses(change, sentence):
    settings = dict(in_channels=[4, 4, 4], out_channels=8, num_outs=5)
    with pytest.raises(ValueError) as error:
        RCNet(**{**settings, **change})
    assert str(error.value) == sentence


def test_rcnet_refuses_other_levels_than_it_has():
    with pytest.raises(ValueError) as error:
        RCNet([4, 4, 4], 8, 5)(pyramid(4, 8, 8, 4))
    assert str(error.value) == (
        'in_channels of RCNet names 3 levels, but the input has 4: write one '
        'number for each of out_indices of the backbone'
    )


def test_sepc_refuses():
    with pytest.raises(ValueError) as error:
        SEPC([8, 8], 8)
    assert str(error.value) == (
        'in_channels=[8, 8] of SEPC is not an integer: write one number, as '
        'all levels share their kernels'
    )
    with pytest.raises(ValueError) as error:
        SEPC(8, 8, num_convs=0)
    assert str(error.value) == (
        'num_convs=0 of SEPC is too small or not an integer: write 1 or more'
    )
