from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.graphs import floats, u8
from toolkit.evaluators.twin.quantised import add, dequantize, matmul, multiply, outside, quantize
from toolkit.evaluators.twin.values import Codes, Pooled, Scaled, plain, round_to_grid

ENDS = {np.uint8: (0.0, 255.0), np.int8: (-128.0, 127.0)}


def reference(values: Any, scale: Any, point: Any, kind: Any, axis: int | None = None) -> Any:
    """QuantizeLinear by its definition, in numpy."""
    shape = [1] * values.ndim
    if axis is not None:
        shape[axis] = -1
        scale, point = scale.reshape(shape), point.reshape(shape)
    ends = np.iinfo(kind)
    return np.clip(np.rint(values / scale) + point.astype(np.float32), ends.min, ends.max).astype(kind)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_quantisers_round_by_the_definition_ties_included(kind: Any) -> None:
    values = np.arange(-300, 300, 0.25, dtype=np.float32)  # every fourth is halfway
    for scale, point in ((np.float32(1), kind(7)), (np.float32(0.37), kind(100))):
        wanted = reference(values, scale, np.asarray(point), kind)
        codes = quantize(torch.from_numpy(values), torch.tensor(scale), offset=float(point), ends=ENDS[kind])
        np.testing.assert_array_equal(plain(codes).numpy(), wanted.astype(np.float32))
        real = plain(dequantize(codes, torch.tensor(scale), offset=float(point)))
        np.testing.assert_allclose(real.numpy(), (wanted.astype(np.float32) - point) * scale, rtol=1e-6)


def test_scales_and_zero_points_per_channel() -> None:
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32) * 3
    scale, point = floats([0.01, 0.02, 0.5]), u8([0, 128, 255])
    wanted = reference(values, scale, point, np.uint8, axis=1)
    tensors = torch.from_numpy(scale), torch.from_numpy(point.astype(np.int64))
    codes = quantize(torch.from_numpy(values), *tensors)
    np.testing.assert_array_equal(plain(codes).numpy(), wanted.astype(np.float32))
    real = plain(dequantize(codes, *tensors))
    shape = (1, 3, 1, 1)
    expected = (wanted.astype(np.float32) - point.astype(np.float32).reshape(shape)) * scale.reshape(shape)
    np.testing.assert_allclose(real.numpy(), expected, rtol=1e-6)


def test_a_dequantiser_may_have_another_grid_than_the_quantiser() -> None:
    values = torch.tensor([0.0, 0.502, 1.0])
    codes = quantize(values, torch.tensor(1 / 255), offset=3.0)
    assert plain(codes).tolist() == [3, 131, 255]
    assert plain(dequantize(codes, torch.tensor(2.0), offset=100.0)).tolist() == [-194, 62, 310]


def test_integers_of_the_file_are_dequantised() -> None:
    found = dequantize(torch.tensor([-3, 0, 5]), torch.tensor(0.5), torch.tensor([1]))
    assert plain(found).tolist() == [-2, -0.5, 2]


@pytest.mark.parametrize("divide", [True, False])
def test_the_gradient_goes_straight_through_inside_of_the_range_only(divide: bool) -> None:
    values = torch.tensor([-0.6, -0.4, 0.2, 1.3, 3.4, 3.6], requires_grad=True)
    factor = torch.tensor(1.0)
    (gradient,) = torch.autograd.grad(round_to_grid(values, factor, 0.0, 3.0, divide=divide).sum(), values)
    assert gradient.tolist() == [0, 1, 1, 1, 1, 0]


def test_the_gradient_of_quantising_and_dequantising_is_the_ratio_of_the_scales() -> None:
    for scale, point in ((torch.tensor([0.5]), torch.tensor([2])), (torch.tensor([0.5, 0.25]), torch.tensor([2, 3]))):
        values = torch.tensor([[0.3, 0.6]], requires_grad=True)
        plain(dequantize(quantize(values, scale, point), torch.tensor(2.0))).sum().backward()
        assert values.grad is not None
        torch.testing.assert_close(values.grad, (2.0 / scale).expand(1, 2))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", [add, multiply])
def test_the_gradient_of_a_quantised_pair_is_that_of_the_real_numbers(operation: Any, kind: torch.dtype) -> None:
    first, second = (torch.tensor(row, requires_grad=True) for row in ([1.0, 20.0], [3.0, 100.0]))
    scaled = [
        Scaled(row.to(kind), torch.tensor(scale, dtype=kind), 5.0) for row, scale in ((first, 0.5), (second, 0.25))
    ]
    real = [row.detach() * scale for row, scale in ((first, 0.5), (second, 0.25))]
    step = torch.tensor(0.25, dtype=kind)
    codes = quantize(operation(*scaled), step, offset=10.0)
    wanted = real[0] + real[1] if operation is add else real[0] * real[1]
    torch.testing.assert_close(plain(codes).float(), (wanted / 0.25 + 10).clamp(0, 255).round())
    plain(codes).sum().backward()
    factors = (torch.ones(2), torch.ones(2)) if operation is add else (real[1], real[0])
    inside = (wanted / 0.25 + 10 < 255.5).float()
    for row, scale, factor in ((first, 0.5, factors[0]), (second, 0.25, factors[1])):
        assert row.grad is not None
        torch.testing.assert_close(row.grad, scale / 0.25 * factor * inside)


def test_pairs_that_are_not_quantised_are_plain() -> None:
    first, second = Scaled(torch.tensor([4.0]), torch.tensor(0.5)), Scaled(torch.tensor([6.0]), torch.tensor(0.25))
    assert plain(add(first, second)).tolist() == [3.5]
    assert plain(multiply(first, second)).tolist() == [3.0]
    assert plain(add(first, torch.tensor([1.0]))).tolist() == [3.0]


def test_products_of_integers_keep_scales_per_column() -> None:
    first = Scaled(torch.tensor([[1.0, 2.0]]), torch.tensor(0.5))
    second = Scaled(torch.tensor([[3.0, 4.0, 0.0], [5.0, 6.0, 1.0]]), torch.tensor([[0.1, 0.2, 0.3]]))
    found = matmul(first, second)
    assert isinstance(found, Scaled) and found.values.tolist() == [[13.0, 16.0, 2.0]]
    torch.testing.assert_close(plain(found), plain(first) @ plain(second))
    rows = Scaled(second.values, torch.tensor([[0.1], [0.2]]))
    torch.testing.assert_close(matmul(first, rows), plain(first) @ plain(rows))


def test_what_a_quantiser_clips() -> None:
    values, scale = torch.tensor([-3.0, -0.6, -0.4, 2.0, 255.4, 255.6]), torch.tensor(1.0)
    assert outside(values, scale, offset=0.0).tolist() == [False] * 5 + [True]  # below 0 lies the ReLU
    assert outside(values, scale, offset=2.0).tolist() == [True, False, False, False, True, True]
    per_channel = outside(values, scale.expand(6), torch.tensor([2, 0, 0, 0, 0, 0]), axis=0)
    assert per_channel.tolist() == [True, False, False, False, False, True]


def test_pooled_values_round_with_the_zero_point_added() -> None:
    means, one = torch.tensor([0.5, 1.5, 2.5]), torch.tensor(1.0)
    for point, wanted in ((0.0, [0, 2, 2]), (1.0, [2, 2, 4])):
        codes = quantize(Pooled(means), one, offset=point)
        assert plain(codes).tolist() == wanted  # round(mean + zero point); a plain quantiser rounds before it adds
        assert plain(quantize(Pooled(means), one, offset=point, integer_kernel=False)).tolist() == [
            point,
            2 + point,
            2 + point,
        ]
    assert plain(Pooled(means)) is means


def test_codes_are_plain_integers() -> None:
    assert plain(Codes(torch.tensor([-2.0, 0.0]), 5.0)).tolist() == [3, 5]
