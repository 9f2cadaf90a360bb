"""The equations, on cases that can be computed by hand."""

import math

import pytest
import torch

from mmagvm.core.functional import (
    adam_divisor,
    half_batch_norms,
    modulate,
    pairs_noise,
    pairs_variance,
    split_variance,
    squared_norms,
    sum_type,
)


def variance(first, second):
    """phi of one module from its two halves, each a list of tensors."""
    first = [torch.tensor(t) for t in first]
    second = [torch.tensor(t) for t in second]
    total = [a + b for a, b in zip(first, second)]
    signed = [a - b for a, b in zip(first, second)]
    norms = half_batch_norms(total, signed)
    return split_variance(norms[None]).item()


@pytest.mark.parametrize(
    'second, expected',
    [
        ([[3.0, 4.0], [12.0]], 0.0),  # identical
        ([[6.0, 8.0], [24.0]], 0.0),  # twice as long: the cosine does not care
        ([[-3.0, -4.0], [-12.0]], 2.0),  # opposite
        ([[4.0, -3.0], [0.0]], 1.0),  # orthogonal
        ([[0.0, 0.0], [13.0]], 1 - 12 / 13),  # in between
    ],
)
def test_variance_is_one_minus_cosine(second, expected):
    assert variance([[3.0, 4.0], [12.0]], second) == pytest.approx(
        expected, abs=1e-7
    )


def test_identical_halves_give_exactly_zero():
    torch.manual_seed(0)
    half = torch.randn(1001).tolist()
    assert variance([half], [half]) == 0


def test_variance_of_bfloat16_is_computed_in_float32():
    total = [torch.full((300,), 1.0, dtype=torch.bfloat16)]
    norms = half_batch_norms(total, [torch.zeros_like(total[0])])
    # in bfloat16 the norm sqrt(300) would have been 17.25 and its square 297.6
    assert norms[0].item() == pytest.approx(300, rel=1e-6)


@pytest.mark.parametrize('first, second', [([0.0], [1.0]), ([0.0], [0.0])])
def test_half_without_gradient_has_no_variance(first, second):
    assert math.isnan(variance([first], [second]))


def test_parts_of_a_module_add_up():
    torch.manual_seed(0)
    total, signed = torch.randn(2, 8), torch.randn(2, 8)
    whole = half_batch_norms([total], [signed])
    parts = half_batch_norms([total[0]], [signed[0]]) + half_batch_norms(
        [total[1]], [signed[1]]
    )
    assert torch.allclose(whole, parts)


def test_adam_divisor_includes_this_gradient():
    # v_t = 0.75 * 4 + 0.25 * 16 = 7
    (divisor,) = adam_divisor(
        [torch.tensor([4.0])], [torch.tensor([4.0])], 0.75, 0.5
    )
    assert divisor.item() == pytest.approx(math.sqrt(7) + 0.5)


def modulated(
    phi,
    lr_scale=(1.0, 1.0),
    ema_decay=0.75,
    eps=0.0,
    ratio_range=(0.1, 10.0),
    anchor=0,
):
    return modulate(
        torch.tensor(lr_scale, dtype=torch.float64),
        torch.tensor(phi, dtype=torch.float64),
        anchor,
        ema_decay,
        eps,
        ratio_range,
    ).tolist()


def test_modules_follow_the_anchor():
    # ratio sqrt(1 / 0.25) = 2, mu = 0.75 * 1 + 0.25 * 2
    assert modulated([1.0, 0.25]) == [1.0, 1.25]
    assert modulated([0.25, 1.0]) == [1.0, 0.875]
    assert modulated([0.25, 1.0], anchor=1) == [1.25, 1.0]


def test_moving_average_weights_the_old_value():
    assert modulated([1.0, 0.25], lr_scale=(1.0, 5.0)) == [1.0, 4.25]


@pytest.mark.parametrize('ema_decay', [0.0, 0.1, 0.3, 0.7, 0.97, 0.999])
def test_equal_variances_give_exactly_one(ema_decay):
    phis = [0.7234] * 5
    scale = [1.0] * 5
    for _ in range(20):
        scale = modulated(phis, scale, ema_decay, eps=1e-6)
    assert scale == [1.0] * 5


def test_ratio_is_clipped_before_averaging():
    assert modulated([1.0, 0.0], ratio_range=(0.5, 3.0)) == [1.0, 1.5]
    assert modulated([0.0, 1.0], ratio_range=(0.5, 3.0)) == [1.0, 0.875]


def test_eps_keeps_zero_variances_equal():
    assert modulated([0.0, 0.0], eps=1e-6) == [1.0, 1.0]


def test_unmeasured_module_keeps_its_scale():
    nan = math.nan
    assert modulated([1.0, nan], lr_scale=(1.0, 3.0)) == [1.0, 3.0]
    assert modulated([nan, 1.0], lr_scale=(1.0, 3.0)) == [1.0, 3.0]


def pairs(*samples):
    """phi, signal and noise of samples, each a vector."""
    stacked = torch.tensor(samples, dtype=torch.float64)
    local = stacked.square().sum(1).mean()[None]
    mean = stacked.mean(0).square().sum()[None]
    signal, noise = pairs_noise(local, mean, len(samples))
    phi = pairs_variance(local, mean, len(samples))
    return phi.item(), signal.item(), noise.item()


@pytest.mark.parametrize(
    'samples, expected',
    [
        (([3.0, 4.0], [3.0, 4.0]), (0, 25, 0)),  # identical
        (([3.0, 4.0], [-3.0, -4.0]), (2, -25, 50)),  # opposite
        (([3.0, 4.0], [4.0, -3.0]), (1, 0, 25)),  # orthogonal
        # three: products 0, 0 and 1, squares 1, 1 and 1
        (([1.0, 0.0], [0.0, 1.0], [1.0, 0.0]), (1 - 3 / 7, 1 / 3, 2 / 3)),
    ],
)
def test_pairs_by_hand(samples, expected):
    # phi = 1 - signal / (signal + 2 * noise / W); (1/3) / (1/3 + 4/9) = 3/7
    assert pairs(*samples) == pytest.approx(expected)


def test_estimators_agree_on_two_samples_of_equal_norm():
    torch.manual_seed(0)
    first, second = torch.nn.functional.normalize(torch.randn(2, 50))
    assert pairs(first.tolist(), second.tolist())[0] == pytest.approx(
        variance([first.tolist()], [second.tolist()]), abs=1e-6
    )


def test_pairs_without_gradient_have_no_variance():
    assert math.isnan(pairs([0.0], [0.0])[0])


@pytest.mark.parametrize('shape', [(8_000_001,), (1000, 4000), (70, 999, 3)])
def test_norms_of_large_tensors_are_exact(shape):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.rand(shape, generator=generator)
    for part in (tensor, tensor.mT if tensor.dim() > 1 else tensor[::2]):
        truth = part.double().square().sum().item()
        assert squared_norms([part]).item() == pytest.approx(truth, rel=5e-7)


def test_large_tensor_that_is_not_finite_has_no_norm():
    tensor = torch.ones(2**17)
    for place in (0, -1):
        for value in (math.nan, math.inf):
            tensor[place] = value
            assert not squared_norms([tensor]).isfinite().any()
            tensor[place] = 1


@pytest.mark.parametrize(
    'device, expected',
    [
        ('cpu', torch.float64),
        ('cuda:1', torch.float64),
        ('mps', torch.float32),
        ('xpu', torch.float32),
    ],
)
def test_sums_are_kept_in_what_a_device_has(device, expected):
    assert sum_type(torch.device(device)) is expected


def test_squared_norms():
    tensors = [torch.tensor([3.0, 4.0]), torch.tensor([[2.0]])]
    assert squared_norms(tensors).tolist() == [25, 4]
