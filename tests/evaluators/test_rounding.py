from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.toys import GREY, RGB
from toolkit.artifacts import Normalization
from toolkit.evaluators.rounding import Grid, activation_grid, pixel_grid, quantise_weights, round_to

BITS = (1, 2, 4, 8, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [Grid(0.25, 0, 15), Grid(0.125, -8, 7), Grid(2.0, 0, 1, origin=-1.0)])
def test_rounding_is_that_of_numpy(grid: Grid, dtype: torch.dtype) -> None:
    # steps are powers of two, so that ties are ties in either dtype
    values = torch.arange(-3, 6, 0.0625).to(dtype)
    exact = (values.double().numpy() - grid.origin) / grid.step
    wanted = grid.origin + grid.step * np.clip(np.rint(exact), grid.lowest, grid.highest)
    found = round_to(values, grid)
    assert found.dtype == dtype
    assert np.array_equal(found.double().numpy(), wanted)


@given(low=st.floats(-20, 0), high=st.floats(0.01, 20), bits=st.sampled_from((2, 4, 8)))
@settings(max_examples=60, deadline=None)
def test_rounding_is_torchs_own_fake_quantisation(low: float, high: float, bits: int) -> None:
    grid = activation_grid(low, high, bits)
    values = (torch.rand(400, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2) * (high - low) + low
    mine, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    found = round_to(mine, grid)
    levels = 2**bits - 1
    wanted = torch.fake_quantize_per_tensor_affine(theirs, grid.step, -grid.lowest, 0, levels)
    slope = torch.linspace(-1, 1, 400)
    (found * slope).sum().backward()  # type: ignore[no-untyped-call]
    (wanted * slope).sum().backward()  # type: ignore[no-untyped-call]
    assert mine.grad is not None and theirs.grad is not None
    # theirs adds the zero point before it rounds: ties, and only ties, may go the other way
    exact = values.double() / grid.step
    clear = ((exact - exact.floor()) - 0.5).abs() > 1e-4
    assert torch.allclose(found[clear], wanted[clear], atol=1e-6 * (high - low))
    assert torch.equal(mine.grad[clear], theirs.grad[clear])


def test_the_gradient_passes_straight_through_and_stops_where_values_are_clipped() -> None:
    values = torch.tensor([-1.2, -0.6, -0.5, 0.0, 0.3, 1.0, 1.05, 1.2], requires_grad=True)
    grid = Grid(0.25, -2, 4)  # -0.5 to 1, and half a step more
    slope = torch.arange(1.0, 9.0)
    (round_to(values, grid) * slope).sum().backward()  # type: ignore[no-untyped-call]
    assert values.grad is not None
    assert values.grad.tolist() == [0, 2, 3, 4, 5, 6, 7, 0]


def test_a_rounding_relu_has_the_relus_gradient() -> None:
    values = torch.tensor([-1.0, -1e-3, 0.0, 1e-3, 0.04, 0.06, 0.9], requires_grad=True)
    rounded = round_to(values, Grid(0.1, 0, 10), rectify=True)
    rounded.sum().backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(rounded, torch.tensor([0, 0, 0, 0, 0, 0.1, 0.9]))
    assert values.grad is not None
    assert values.grad.tolist() == [0, 0, 0, 1, 1, 1, 1]


@given(low=st.floats(-30, 30), high=st.floats(-30, 30), bits=st.sampled_from(BITS))
@settings(max_examples=200, deadline=None)
def test_activation_grids_have_zero_and_cover_all_but_half_a_step(low: float, high: float, bits: int) -> None:
    low, high = sorted((low, high))
    grid = activation_grid(low, high, bits)
    assert grid.highest - grid.lowest == 2**bits - 1
    ends = (grid.origin + grid.step * grid.lowest, grid.origin + grid.step * grid.highest)
    slack = 0.5001 * grid.step
    assert ends[0] <= min(low, 0) + slack and ends[1] >= max(high, 0) - slack
    if bits > 1 or low >= 0 or high <= 0:
        assert grid.origin == 0 and grid.lowest <= 0 <= grid.highest


def test_one_bit_for_both_signs_is_the_two_ends() -> None:
    values = torch.tensor([-5.0, -1.0, 0.4, 0.6, 9.0])
    assert round_to(values, activation_grid(-1.0, 2.0, 1)).tolist() == [-1, -1, -1, 2, 2]


def test_nothing_but_zero_stays_zero() -> None:
    for high in (0.0, 5e-324, 1e-30):
        assert round_to(torch.zeros(3), activation_grid(0.0, high, 8)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("normalization", [GREY, RGB, Normalization((0.0,), (1.0,))])
@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("bits", BITS)
def test_pixel_grids_cover_the_margin_in_every_channel(normalization: Normalization, margin: float, bits: int) -> None:
    grid = pixel_grid(normalization, margin, bits)
    low, high = (grid.origin + grid.step * end for end in (grid.lowest, grid.highest))
    if bits > 1 or margin == 0:  # one bit has no room for a zero within
        for mean, std in zip(normalization.mean, normalization.std, strict=True):
            assert low <= (-margin - mean) / std + 1e-6
            assert high >= (1 + margin - mean) / std - 1e-6


@pytest.mark.parametrize("bits", [2, 4, 7, 8, 16])
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 5, 3), nn.Linear(7, 5), nn.Conv2d(6, 4, 3, groups=2)])
def test_weights_are_whole_multiples_of_a_scale_per_channel(bits: int, layer: nn.Conv2d | nn.Linear) -> None:
    weights = layer.weight.detach()
    found = quantise_weights(weights, bits)
    steps = {7: 64}.get(bits, 2 ** (bits - 1) - 1)
    for row, own in zip(found.double().numpy(), weights.double().numpy(), strict=True):
        scale = np.abs(own).max() / steps
        assert np.allclose(row, scale * np.rint(own / scale), atol=0.001 * scale if bits < 16 else 1.001 * scale)
        assert np.abs(row).max() == pytest.approx(np.abs(own).max(), rel=1e-5), (
            "narrow range: both ends are the largest"
        )


def test_one_scale_for_all_channels() -> None:
    weights = torch.tensor([[1.0, -0.3], [0.02, 0.004]])
    scale = 1 / 127
    wanted = torch.tensor([[127, -38], [3, 1]]) * scale
    assert torch.allclose(quantise_weights(weights, 8, per_channel=False), wanted)
    assert torch.allclose(quantise_weights(weights, 8)[1], torch.tensor([127, 25]) * (0.02 / 127))


def test_one_bit_weights_are_plus_or_minus_the_mean_magnitude() -> None:
    weights = torch.tensor([[1.0, -3.0, 0.0], [0.3, 0.3, -0.6]])
    wanted = torch.tensor([[4 / 3, -4 / 3, 4 / 3], [0.4, 0.4, -0.4]])
    assert torch.allclose(quantise_weights(weights, 1), wanted)
    assert torch.allclose(quantise_weights(weights, 1, per_channel=False).abs(), torch.full((2, 3), 5.2 / 6))


def test_weights_of_nothing_stay_nothing() -> None:
    for bits in BITS:
        assert torch.equal(quantise_weights(torch.zeros(2, 3), bits), torch.zeros(2, 3))


@given(bits=st.sampled_from(BITS), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_rounding_weights_twice_changes_nothing_and_scaling_channels_commutes(bits: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(4, 3, 3, 3, generator=generator)
    once = quantise_weights(weights, bits)
    assert torch.allclose(quantise_weights(once, bits), once, atol=1e-6)
    powers = torch.tensor([0.5, 2.0, 4.0, 1.0]).view(4, 1, 1, 1)  # exact in float32
    assert torch.allclose(quantise_weights(weights * powers, bits), once * powers, atol=1e-6)
