from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.toys import GREY, RGB
from toolkit.artifacts import Normalization
from toolkit.evaluators.rounding import activation_grid, quantise_weights, round_to
from toolkit.exporters.input_range import folding_grid
from toolkit.training.fake_quantisers import (
    WEIGHT,
    ActivationQuantiser,
    PixelQuantiser,
    Switch,
    WeightQuantiser,
    fit_range,
    lend_weights,
    take_weights_back,
)


def error(values: Tensor, low: float, high: float, bits: int) -> float:
    return float((round_to(values, activation_grid(low, high, bits)) - values).square().mean())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["rectified", "both signs", "negative"])
def test_no_wider_or_narrower_range_rounds_better(bits: int, kind: str) -> None:
    normal = torch.randn(8000, generator=torch.Generator().manual_seed(0))
    values = {"rectified": normal.relu(), "both signs": normal + 0.3, "negative": -normal.abs()}[kind]
    low, high = fit_range(values, bits)
    best = error(values, low, high, bits)
    assert best <= error(values, float(values.min()), float(values.max()), bits)
    for share in (0.7, 1.4):
        assert best <= error(values, share * low, share * high, bits)
    assert low <= 0 <= high


def test_fewer_bits_clip_more() -> None:
    values = torch.randn(8000, generator=torch.Generator().manual_seed(0)).relu()
    ends = [fit_range(values, bits)[1] for bits in (2, 4, 8)]
    assert ends == sorted(ends) and ends[0] < 0.8 * ends[2]


def test_nothing_but_zeros_stays_so() -> None:
    assert fit_range(torch.zeros(10), 8) == (0.0, 0.0)


def test_every_call_has_its_own_range() -> None:
    quantiser = ActivationQuantiser((True, False, True), 4, Switch(rounding=False, keep=0.0)).train()
    for scale in (1.0, 2.0, 3.0):
        quantiser(scale * torch.rand(1000))
    first, _, third = quantiser.ends.tolist()
    assert third[1] > 2 * first[1] > 0 and quantiser.ends[1].tolist() == [-1, 1]
    assert quantiser(torch.tensor([5.0])).item() == 5.0  # a call beyond those that are known


def test_ranges_move_by_the_share_that_is_not_kept() -> None:
    quantiser = ActivationQuantiser((True,), 8, Switch(rounding=False, keep=0.75)).train()
    quantiser.ends.copy_(torch.tensor([[0.0, 1.0]]))
    values = torch.rand(1000) * 5
    quantiser(values)
    assert quantiser.ends[0, 1].item() == pytest.approx(0.75 + 0.25 * fit_range(values, 8)[1])


def test_ranges_stand_still_in_evaluation_mode_and_without_leave() -> None:
    for quantiser in (
        ActivationQuantiser((True,), 8, Switch(keep=0.0)).eval(),
        ActivationQuantiser((True,), 8, Switch(keep=None)).train(),
    ):
        quantiser(torch.rand(10) * 9)
        assert quantiser.ends.tolist() == [[-1, 1]]


@pytest.mark.parametrize("normalization", [GREY, RGB, Normalization((0.1, 0.2, 0.9), (0.3, 0.3, 0.1))])
@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_pixels_lie_on_the_grid_of_the_folded_input_quantiser(normalization: Normalization, margin: float) -> None:
    channels = len(normalization.mean)
    mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in (normalization.mean, normalization.std))
    quantiser = PixelQuantiser(normalization, margin, 8, folds=True, switch=Switch())
    pixels = torch.rand((50, channels, 4, 4), generator=torch.Generator().manual_seed(0)) * (1 + 2 * margin) - margin
    rounded = quantiser((pixels - mean) / std) * std + mean
    found = folding_grid(mean.double().flatten().numpy(), margin)
    if found is None:  # one grid for all channels, in normalised units
        assert float((rounded - pixels).abs().max()) <= 1.2 * float(std.max() / std.min()) / 255
        return
    step = torch.from_numpy(found[0].step).float().view(1, -1, 1, 1)
    whole = rounded / step
    assert torch.allclose(whole, whole.round(), atol=1e-3)
    assert bool(((rounded - pixels).abs() <= step / 2 + 1e-5).all())


@pytest.mark.parametrize("bits", [2, 4])
def test_pixels_of_few_bits_take_as_many_values(bits: int) -> None:
    quantiser = PixelQuantiser(GREY, 0.0, bits, folds=True, switch=Switch())
    assert 2**bits - 1 <= len(quantiser(torch.linspace(-1, 1, 1000).view(1, 1, 1, -1)).unique()) <= 2**bits


def layer_that_rounds(bits: int, switch: Switch) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    layer.add_module(WEIGHT, WeightQuantiser(bits, switch))
    layer.register_forward_pre_hook(lend_weights)
    layer.register_forward_hook(take_weights_back, always_call=True)
    return layer


def test_a_layer_computes_on_rounded_weights_and_learns_float_ones() -> None:
    layer = layer_that_rounds(4, Switch())
    own, images = layer.weight, torch.rand(5, 6)
    result = layer(images)
    rounded = quantise_weights(own.detach(), 4)
    assert torch.allclose(result, nn.functional.linear(images, rounded, layer.bias), atol=1e-6)
    result.sum().backward()
    assert layer.weight is own and own.grad is not None
    assert torch.allclose(own.grad, images.sum(0).expand(3, 6))  # straight through
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_the_float_weights_come_back_after_an_error() -> None:
    layer = layer_that_rounds(8, Switch())
    own = layer.weight
    with pytest.raises(RuntimeError):
        layer(torch.rand(5, 7))
    assert layer.weight is own and dict(layer.named_parameters())["weight"] is own


def test_frozen_weights_are_rounded_again_when_they_change() -> None:
    layer = layer_that_rounds(4, Switch()).requires_grad_(False)
    images = torch.rand(5, 6)
    with torch.inference_mode():
        layer(images)
    leaf = images.clone().requires_grad_(True)
    before = layer(leaf)
    (gradient,) = torch.autograd.grad(before.sum(), leaf)
    assert torch.allclose(gradient[0], quantise_weights(layer.weight, 4).sum(0))
    assert torch.equal(before, layer(images))
    layer.weight.copy_(2 * layer.weight)
    expected = nn.functional.linear(images, quantise_weights(layer.weight, 4), layer.bias)
    assert torch.allclose(layer(images), expected, atol=1e-6)


def test_copies_share_the_switch_and_nothing_else() -> None:
    switch = Switch()
    layer = layer_that_rounds(2, switch)
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        copied.weight.mul_(2)
    images = torch.rand(2, 6)
    rounded = (layer(images), copied(images))
    switch.rounding = False
    for one, before in zip((layer, copied), rounded, strict=True):
        assert torch.equal(one(images), nn.functional.linear(images, one.weight, one.bias))
        assert not torch.allclose(one(images), before)
