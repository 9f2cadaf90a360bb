"""UniNet: its sizes, its blocks against plain references, its settings."""

import math

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmagvm.engine.shard_units import find_units
from mmagvm.models.transformer_block import (
    Attention,
    DropPath,
    from_windows,
    to_windows,
)
from mmagvm.models.uninet import ARCHS, MBConv, UniNet, kept_statistics

#: Of each kind of stage a short one.
SMALL = [
    dict(block='fused_mbconv', expansion=1, channels=8, depth=2),
    dict(block='fused_mbconv', expansion=2, channels=12, depth=2, stride=2),
    dict(block='mbconv', expansion=2, channels=16, depth=2, stride=2),
    dict(
        block='transformer',
        expansion=2,
        channels=16,
        depth=3,
        windows=(4, None),
    ),
    dict(
        block='transformer',
        expansion=2,
        channels=32,
        depth=2,
        stride=2,
        windows=(3, None),
    ),
]


def small(**settings):
    torch.manual_seed(0)
    return UniNet(
        **{
            **dict(arch=SMALL, out_indices=(2, 3, 4), stem_channels=8),
            **dict(head_dim=8, layer_scale=0.5),
            **settings,
        }
    )


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


# -- the paper's size


@pytest.mark.parametrize(
    'settings, stages, total',
    [
        (
            dict(with_se=False),
            [0.56, 15.5, 153.6, 174.2, 48.0, 653.7],
            1045.5,
        ),
        (dict(), [0.58, 18.5, 199.6, 200.3, 48.0, 653.7], 1120.7),
        (dict(with_se=False, transition='dsm'), None, 1080.3),
        (dict(transition='dsm'), None, 1158.4),
    ],
)
def test_parameters_of_uninet_g(settings, stages, total):
    """By the formulas of public code, in millions."""
    with torch.device('meta'):
        model = UniNet(**settings)
    assert millions(model) == pytest.approx(total, abs=0.05)
    if stages is not None:
        found = [millions(stage) for stage in model.stages]
        assert found == pytest.approx(stages, abs=0.051)
    blocks = [block for stage in model.stages for block in stage]
    assert len(blocks) == 105
    assert model.out_indices == (2, 4, 5)


def test_parameters_with_depthwise_convolutions():
    arch = [
        dict(stage, block='mbconv')
        if stage['block'] == 'fused_mbconv'
        else stage
        for stage in ARCHS['G']
    ]
    with torch.device('meta'):
        model = UniNet(arch=arch, with_se=False)
    assert millions(model) == pytest.approx(772.6, abs=0.05)


def test_windows_of_uninet_g():
    """Two of 448 pixels, then the whole map: 6 times, and 12 times."""
    with torch.device('meta'):
        model = UniNet()
    found = [
        [block.attention.window for block in stage]
        for stage in (model.stages[4], model.stages[5])
    ]
    assert found == [[28, 28, None] * 6, [14, 14, None] * 12]


def test_blocks_are_units_of_shards():
    model = nn.Module()
    with torch.device('meta'):
        model.backbone = UniNet()
    units = find_units(model)
    assert len(units) == 105
    assert units[0] == 'backbone.stages.0.0'


# -- what it computes


@pytest.mark.parametrize('transition', ['block', 'dsm'])
@pytest.mark.parametrize('size', [(64, 64), (33, 50)])
def test_shapes_and_gradients(transition, size):
    arch = SMALL
    if transition == 'dsm':  # whose heads have 32 channels
        arch = [dict(stage, channels=32) for stage in SMALL]
    model = small(transition=transition, arch=arch)
    for module in model.modules():  # else their branches are zero
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    outputs = model(torch.randn(2, 3, *size))
    sides = [math.ceil(size[0] / s) for s in (8, 8, 16)]
    assert [tuple(o.shape[:3]) for o in outputs] == [
        (2, stage['channels'], side) for stage, side in zip(arch[2:], sides)
    ]
    sum(output.square().mean() for output in outputs).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        # where a ReLU of two channels may let nothing through
        if 'squeeze' not in name and 'excite.weight' not in name:
            assert param.grad.abs().sum() > 0, name


def test_windows_are_cut_and_put_back():
    x = torch.arange(2 * 5 * 7.0).view(2, 5, 7, 1)
    windows, size = to_windows(x, 3)
    assert size == (6, 9)
    assert windows.shape == (2 * 2 * 3, 9, 1)
    # the second window of the first image: rows 0 to 2, columns 3 to 5
    assert torch.equal(windows[1, :, 0], x[0, :3, 3:6, 0].flatten())
    # the last one is zero beyond the map
    assert windows[5, -1, 0] == 0
    assert torch.equal(from_windows(windows, 3, size)[:, :5, :7], x)


def slow_attention(attention, tokens):
    """(tokens, C), head by head, token by token."""
    channels, size = tokens.shape[1], attention.head_dim
    q, k, v = attention.qkv(tokens).split(channels, 1)
    mixed = torch.zeros_like(tokens)
    for first in range(0, channels, size):
        part = slice(first, first + size)
        for place in range(len(tokens)):
            scores = (k[:, part] @ q[place, part]) / math.sqrt(size)
            mixed[place, part] = scores.softmax(0) @ v[:, part]
    return attention.proj(mixed)


def test_global_attention_equals_its_equations():
    torch.manual_seed(0)
    attention = Attention(8, 6, 4).double()
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    expected = torch.stack(
        [slow_attention(attention, image.flatten(0, 1)) for image in x]
    )
    torch.testing.assert_close(attention(x), expected.view(2, 3, 5, 6))


def test_windows_attend_to_themselves_and_to_padding():
    torch.manual_seed(0)
    attention = Attention(8, 8, 4, window=3).double()
    x = torch.randn(1, 4, 5, 8, dtype=torch.float64)
    padded = torch.zeros(6, 6, 8, dtype=torch.float64)
    padded[:4, :5] = x[0]
    expected = torch.zeros_like(padded)
    for row in (0, 3):
        for column in (0, 3):
            tokens = padded[row : row + 3, column : column + 3]
            expected[row : row + 3, column : column + 3] = slow_attention(
                attention, tokens.reshape(9, 8)
            ).view(3, 3, 8)
    torch.testing.assert_close(attention(x)[0], expected[:4, :5])


def test_mbconv_begins_as_its_shortcut():
    """As the last norm's gain is zero."""
    block = MBConv(4, 4, 3, 1, False, True, 0.0, dict(type='BN'))
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_checkpointing_changes_nothing():
    """Neither gradients nor what batch norms keep."""
    x = torch.randn(2, 3, 32, 32)
    found = []
    for with_cp in (False, True):
        model = small(with_cp=with_cp, drop_path_rate=0.3)
        torch.manual_seed(1)
        sum(output.square().mean() for output in model(x)).backward()
        found.append(
            (
                {n: p.grad for n, p in model.named_parameters()},
                dict(model.named_buffers()),
            )
        )
    for ours, other in zip(*found):
        assert ours.keys() == other.keys()
        for name, value in ours.items():
            torch.testing.assert_close(value, other[name], msg=name)


def test_second_forward_would_move_statistics():
    """Which is what checkpointing must not do."""
    norm = nn.BatchNorm2d(2)
    x = torch.randn(4, 2, 3, 3)
    norm(x)
    once = {name: value.clone() for name, value in norm.named_buffers()}
    with kept_statistics(norm):
        norm(x)
    for name, value in norm.named_buffers():
        assert torch.equal(value, once[name]), name
    norm(x)
    assert not torch.equal(norm.running_mean, once['running_mean'])
    assert norm.momentum == 0.1


def test_drop_path_is_by_image_and_for_training_only():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2)
    rows = drop(x)
    assert torch.equal(rows[:, 0], rows[:, 1])
    assert rows.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert rows.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(x), x)


def test_drop_path_grows_along_the_blocks():
    model = small(drop_path_rate=0.4)
    rates = [b.drop_path.probability for s in model.stages for b in s]
    assert rates == pytest.approx([0.4 * i / 10 for i in range(11)])


def test_frozen_stages_and_norms_stay():
    model = small(frozen_stages=1, norm_eval=True).train()
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert not any(p.requires_grad for p in model.stages[1].parameters())
    assert all(p.requires_grad for p in model.stages[2].parameters())
    assert not any(
        m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d)
    )


@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
def test_both_packages_find_it(package):
    registry = pytest.importorskip(f'{package}.registry').MODELS
    model = registry.build(
        dict(type='UniNet', arch=SMALL, out_indices=(4,), head_dim=8)
    )
    assert isinstance(model, UniNet)
    assert MODELS.get('UniNet') is UniNet


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(arch='H'), "arch='H' of UniNet is none of"),
        (dict(arch=[dict(block='conv')]), r"stage 0 .* has \['block'\]"),
        (
            dict(arch=[dict(SMALL[0], block='conv')]),
            "has block='conv': write one of",
        ),
        (dict(arch=[dict(SMALL[0], stride=3)]), 'has stride=3: write 1 or 2'),
        (dict(head_dim=5), 'head_dim=5 of UniNet does not divide'),
        (dict(out_indices=(5,)), r'out_indices=\(5,\) .* from 0 to 4'),
        (dict(transition='pool'), "write 'block' or 'dsm'"),
        (dict(drop_path_rate=1), 'from 0 to below 1'),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        small(**settings)
