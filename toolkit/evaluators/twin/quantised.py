"""Quantisers, and the layers that multiply integers: what ONNX Runtime fuses into its integer kernels."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from toolkit.evaluators.twin.float_kernel import settle_ties
from toolkit.evaluators.twin.softmax import SoftmaxKernel, is_whole, take
from toolkit.evaluators.twin.values import (
    Bound,
    Codes,
    Pair,
    Pooled,
    Scaled,
    Shares,
    along,
    plain,
    round_pair,
    round_to_grid,
)

EIGHT_BITS = 255
"""Steps of a grid so coarse that few values lie near a tie. Of 16 bits nearly all do, for a difference of no weight."""


def quantize(
    value: Any,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    offset: float | None = None,
    ends: tuple[float, float] = (0.0, 255.0),
    integer_kernel: bool = True,
    pixels: bool = False,
) -> Codes:
    """QuantizeLinear, straight-through.

    Args:
        value: what is quantised.
        scale: one, or one per channel.
        zero_point: where it is no constant, or differs between channels.
        axis: of the channels.
        offset: the zero point, where it is a constant and the same for all channels.
        ends: of the integer type.
        integer_kernel: a sum or product in front of it is computed from integers.
        pixels: nothing is in front of it but what moves or scales the image.
    """
    if isinstance(value, Pair) and integer_kernel and offset is not None and scale.numel() == 1:
        low, high = ends[0] - offset, ends[1] - offset
        return Codes(round_pair(value, scale.reshape(()), offset, low, high), offset)
    values = value.values if isinstance(value, Scaled) else plain(value)
    step = along(scale, values.ndim, axis)
    if isinstance(value, Pooled) and integer_kernel and offset is not None:
        low, high = ends[0] - offset, ends[1] - offset
        return Codes(round_to_grid(values, step, low, high, divide=True, shift=offset), offset)
    point = _zero_point(zero_point, offset, values, axis)
    least, most = ends[0] - point, ends[1] - point
    if isinstance(value, Shares):
        exact = functools.partial(take, kernel=value.kernel, step=step) if step.ndim == 0 else None
        return Codes(round_to_grid(values, step, least, most, divide=True, edge=exact), point)
    if isinstance(value, Scaled):
        edge = None
        if value.kernel is not None and step.ndim == 0 and ends[1] - ends[0] <= EIGHT_BITS:
            edge = functools.partial(settle_ties, kernel=value.kernel, step=step)
        return Codes(round_to_grid(values, value.scale / step, least, most, divide=False, edge=edge), point)
    return Codes(round_to_grid(values, step, least, most, divide=True, pixels=pixels), point)


def dequantize(
    value: Any, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1, offset: float | None = None
) -> Scaled:
    """DequantizeLinear; arguments as for `quantize`. The zero point may differ from that of the quantiser before it."""
    values = value.values if isinstance(value, Codes) else _floating(value, scale)
    point = _zero_point(zero_point, offset, values, axis)
    before: Bound = value.zero_point if isinstance(value, Codes) else 0.0
    shift: Bound = before - point
    if isinstance(shift, Tensor) or shift != 0:
        values = values + shift
    return Scaled(values, along(scale, values.ndim, axis), point if isinstance(point, float) else 0.0)


def _floating(value: Any, scale: Tensor) -> Tensor:
    tensor: Tensor = plain(value)
    return tensor if tensor.is_floating_point() else tensor.to(scale)


def _zero_point(zero_point: Tensor | None, offset: float | None, values: Tensor, axis: int) -> Bound:
    if offset is not None:
        return offset
    return 0.0 if zero_point is None else along(zero_point.to(values), values.ndim, axis)


def outside(value: Any, scale: Tensor, zero_point: Tensor | None = None, **attributes: Any) -> Tensor:
    """Which values lie beyond what a quantiser represents, bool; arguments as for `quantize`.

    A lower end at the zero point is no limit of the quantiser but the ReLU that was merged into it: not counted.
    """
    values: Tensor = plain(value)
    axis = attributes.get("axis", 1)
    position = (values / along(scale, values.ndim, axis)).round()
    point = _zero_point(zero_point, attributes.get("offset"), values, axis)
    ends: tuple[float, float] = attributes.get("ends", (0.0, 255.0))
    low: Bound = ends[0] - point
    beyond: Tensor = position > ends[1] - point
    if isinstance(low, Tensor):
        return beyond | ((position < low) & (low < 0))
    return beyond if low == 0 else beyond | (position < low)


def layer_scale(value: Scaled, weight: Scaled, rank: int, axis: int) -> Tensor | None:
    """Scale of an integer layer's sums, shaped for its output; None where the factors' scales do not allow one.

    Args:
        value: activations, which must have one scale.
        weight: may have one scale per output channel.
        rank: of the output.
        axis: of the output's channels.
    """
    if value.scale.numel() != 1:
        return None
    return value.scale * along(weight.scale.flatten(), rank, axis)


def integer_bias(bias: Any, scale: Tensor, *, aligned: bool) -> Tensor | None:
    """A layer's bias in units of its sums; of a quantised bias these are the integers of the file.

    Args:
        bias: as the layer gets it, [C].
        scale: of the sums, C values or one.
        aligned: the bias is known to be in these units.
    """
    if bias is None:
        return None
    if isinstance(bias, Scaled):
        return bias.values if aligned else (bias.values * (bias.scale / scale.flatten())).round()
    converted: Tensor = plain(bias) / scale.flatten()
    return converted


def matmul(first: Any, second: Any) -> Any:
    """MatMul; of two scaled tensors the product of the integers, scaled."""
    if isinstance(first, Scaled) and isinstance(second, Scaled) and first.scale.numel() == 1:
        columns = second.scale.shape[-1:].numel() if second.scale.ndim else 1
        if second.scale.numel() == columns:
            return Scaled(torch.matmul(first.values, second.values), first.scale * second.scale.flatten().squeeze())
    return torch.matmul(plain(first), plain(second))


def gemm(
    first: Any,
    second: Any,
    bias: Any = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    trans: tuple[bool, bool] = (False, False),
    aligned: bool = False,
) -> Any:
    """Gemm; of two scaled tensors the sums of the integers, scaled."""
    if isinstance(first, Scaled) and isinstance(second, Scaled) and alpha == beta == 1 and not trans[0]:
        weight = second.values if trans[1] else second.values.T
        channels = 0 if trans[1] else 1
        per_output = second.scale.numel() == 1 or second.scale.shape[channels] == second.scale.numel()
        scale = layer_scale(first, second, 2, 1) if per_output else None
        if scale is not None and (bias is None or _is_vector(bias, len(weight))):
            units = integer_bias(_flat(bias), scale, aligned=aligned)
            return Scaled(functional.linear(first.values, weight, units), scale)
    a, b, c = plain(first), plain(second), plain(bias)
    a, b = a.T if trans[0] else a, b.T if trans[1] else b
    if alpha == beta == 1 and c is not None and c.ndim == 1 and len(c) == b.shape[1]:
        return functional.linear(a, b.T, c)
    product = alpha * torch.matmul(a, b) if alpha != 1 else torch.matmul(a, b)
    return product if c is None else product + (beta * c if beta != 1 else c)


def _is_vector(bias: Any, channels: int) -> bool:
    values = bias.values if isinstance(bias, Scaled) else bias
    return isinstance(values, Tensor) and values.numel() == channels


def _flat(bias: Any) -> Any:
    if isinstance(bias, Scaled):
        return Scaled(bias.values.flatten(), bias.scale.flatten())
    return bias if bias is None else plain(bias).flatten()


def relu(value: Any) -> Any:
    """Relu; the sums that it leaves are those of the layer in front of it."""
    if isinstance(value, Scaled):
        return value._replace(values=torch.relu(value.values))
    return torch.relu(plain(value))


def softmax(value: Any, *, axis: int) -> Any:
    """Softmax along one axis; of a scaled tensor with a quantiser behind it what QLinearSoftmax gives."""
    found = torch.softmax(plain(value), axis)
    if isinstance(value, Scaled) and is_whole(value):
        return Shares(found, SoftmaxKernel(value.values.detach(), value.scale, axis))
    return found


def add(first: Any, second: Any) -> Any:
    """Add; a quantiser may follow the sum of two scaled tensors."""
    if isinstance(first, Scaled) and isinstance(second, Scaled) and first.scale.numel() == second.scale.numel() == 1:
        return Pair("Add", first, second)
    return plain(first) + plain(second)


def multiply(first: Any, second: Any) -> Any:
    """Mul; a quantiser may follow the product of two scaled tensors."""
    if isinstance(first, Scaled) and isinstance(second, Scaled) and first.scale.numel() == second.scale.numel() == 1:
        return Pair("Mul", first, second)
    return plain(first) * plain(second)
