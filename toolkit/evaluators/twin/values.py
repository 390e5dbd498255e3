"""The values that flow through a twin besides plain tensors, and the straight-through rounding that makes them.

A quantised tensor is held as its integers in floating point, centred on the zero point. Integers up to 2^24 are exact
in float32, so that a convolution of centred integers, its int32 bias and the multiplication by
`scale_x * scale_w / scale_y` give the very numbers of ONNX Runtime's integer kernels, and they take few passes over
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from toolkit.evaluators.twin.float_kernel import FloatKernel
from toolkit.evaluators.twin.softmax import SoftmaxKernel

Bound = float | Tensor
"""An end of a quantiser's range, in steps from its zero point: one for all, or one per channel (broadcastable)."""


class Codes(NamedTuple):
    """A quantised tensor: integers minus `zero_point`, in floating point."""

    values: Tensor
    zero_point: Bound


class Scaled(NamedTuple):
    """The tensor `values * scale`, not multiplied out; `scale` is positive and broadcasts against `values`."""

    values: Tensor
    scale: Tensor
    zero_point: float = 0.0
    """Of the integers that were dequantised: the kernels of Add and Mul round differently with it."""
    kernel: FloatKernel | None = None
    """The values are a convolution's, which the runtime computes in float."""


class Pooled(NamedTuple):
    """The mean of dequantised values: a fused quantiser adds its zero point before it rounds, which decides on ties."""

    values: Tensor


class Shares(NamedTuple):
    """The softmax of a dequantised tensor; a fused quantiser rounds what `kernel` computes."""

    values: Tensor
    kernel: SoftmaxKernel


class Pair(NamedTuple):
    """The sum or product of two scaled tensors with one scale each, not computed: a quantiser may follow."""

    operator: Literal["Add", "Mul"]
    first: Scaled
    second: Scaled


HELD = (Codes, Scaled, Pooled, Shares, Pair)
"""What is one value although it is a tuple."""


def plain(value: Any) -> Any:
    """`value` as a tensor of what the graph holds there: real numbers, or the integers of a quantised tensor."""
    if isinstance(value, Pair):
        first, second = value.first, value.second
        if value.operator == "Mul":
            return first.values * second.values * (first.scale * second.scale)
        return torch.addcmul(plain(first), second.values, second.scale)
    if isinstance(value, Scaled):
        return value.values * value.scale
    if isinstance(value, Codes):
        return value.values + value.zero_point
    return value.values if isinstance(value, Pooled | Shares) else value


def along(values: Tensor, rank: int, axis: int) -> Tensor:
    """Per-channel `values` [C] shaped to broadcast against a tensor of `rank` axes; one value becomes a scalar."""
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[axis] = values.numel()
    return values.reshape(shape)


Edge = Callable[[Tensor, float, float], None] | None
"""Puts right, in place, what is rounded to [low, high] where the runtime's kernel computes something else."""


def _clip_and_round(position: Tensor, low: float, high: float, shift: float) -> Tensor:
    found = position.clamp(low + shift, high + shift).round_()
    return found.sub_(shift) if shift else found


class _Round(torch.autograd.Function):
    """round(x * factor), halves to even, clipped to [low, high]; its gradient is `factor` inside and 0 outside.

    The straight-through estimator (Bengio et al. 2013). Outside of the range the gradient must vanish: quantisers
    absorb the ReLU in front of them, and their lower end is then the only non-linearity that the graph has. Of pixels
    it must not: one just outside of a narrow range could not be moved back in.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, factor: Tensor, divide: bool, low: float, high: float, shift: float, edge: Edge,
        pixels: bool,
    ) -> Tensor:  # fmt: skip
        position = values / factor if divide else values * factor
        if edge is not None:
            edge(position, low, high)
        if shift:
            position += shift
        ctx.save_for_backward(position, factor)
        ctx.divide = divide
        ctx.ends = (-math.inf, math.inf) if pixels else (low + shift - 0.5, high + shift + 0.5)
        return _clip_and_round(position, low, high, shift)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        position, factor = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(gradients[0], position, *ctx.ends)
        return inside.div_(factor) if ctx.divide else inside.mul_(factor), None, None, None, None, None, None, None


class _RoundPerChannel(torch.autograd.Function):
    """`_Round` of positions that are computed already, with ends that are tensors."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, low: Tensor, high: Tensor, pixels: bool) -> Tensor:
        ctx.save_for_backward(((position >= low - 0.5) & (position <= high + 0.5)) | pixels)
        return position.round().clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


class _RoundSum(torch.autograd.Function):
    """The integers of ONNX Runtime's QLinearAdd: round(fma(a, ratio_a, fma(b, ratio_b, fixed))) with whole zero points.

    A product of a small integer and a float32 is exact in float64, so that each step below rounds as the fused
    multiply-add does. Were it computed in another order, one sum in 100,000 would round to the other neighbour, and in
    a residual network every later layer would see it.
    """

    @staticmethod
    def forward(
        ctx: Any, first: Tensor, second: Tensor, ratios: Tensor, points: tuple[float, float, float], low: float,
        high: float,
    ) -> Tensor:  # fmt: skip
        if first.dtype == torch.float32:
            a, b = (ratio.double() for ratio in ratios)
            fixed = points[2] - (a * points[0] + (ratios[1] * points[1])).float()
            inner = (second.double() + points[1]).mul_(b).add_(fixed).float()
            position, shift = (first.double() + points[0]).mul_(a).add_(inner).float(), points[2]
        else:
            position, shift = torch.addcmul(first * ratios[0], second, ratios[1]), 0.0
        ctx.save_for_backward(position, ratios)
        ctx.ends = (low + shift - 0.5, high + shift + 0.5)
        return _clip_and_round(position, low, high, shift)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        position, ratios = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(gradients[0], position, *ctx.ends)
        return inside * ratios[0], inside * ratios[1], None, None, None, None


def round_pair(pair: Pair, scale: Tensor, zero_point: float, low: float, high: float) -> Tensor:
    """Integers, centred, that ONNX Runtime's kernels of quantised sums and products give; straight-through.

    Args:
        pair: the two factors or summands.
        scale: one, of the result.
        zero_point: of the result.
        low: least integer, from the zero point.
        high: largest integer, from the zero point.
    """
    first, second = pair.first, pair.second
    if pair.operator == "Add":
        ratios = torch.stack([first.scale / scale, second.scale / scale])
        points = first.zero_point, second.zero_point, zero_point
        shapes = torch.broadcast_tensors(first.values, second.values)  # type: ignore[no-untyped-call]
        total: Tensor = _RoundSum.apply(*shapes, ratios, points, low, high)
        return total
    product = first.values * second.values
    ratio = first.scale * second.scale / scale
    return round_to_grid(product, ratio, low, high, divide=False, shift=zero_point)


def round_to_grid(
    values: Tensor, factor: Tensor, low: Bound, high: Bound, *, divide: bool, shift: float = 0.0, edge: Edge = None,
    pixels: bool = False,
) -> Tensor:  # fmt: skip
    """Integers in [low, high] nearest to `values * factor` (or `values / factor`), with a straight-through gradient.

    Args:
        values: any shape.
        factor: positive, broadcastable, without a gradient.
        low: least integer.
        high: largest integer.
        divide: QuantizeLinear divides by its scale; requantisation multiplies by a ratio of scales.
        shift: a whole number that is added before rounding and taken off again, as some kernels do.
        edge: puts right what is rounded.
        pixels: the gradient does not vanish outside of [low, high].
    """
    if isinstance(low, float) and isinstance(high, float):
        rounded: Tensor = _Round.apply(values, factor, divide, low, high, shift, edge, pixels)
        return rounded
    position = values / factor if divide else values * factor
    ends = (torch.as_tensor(end, dtype=position.dtype, device=position.device) for end in (low, high))
    found: Tensor = _RoundPerChannel.apply(position, *ends, pixels)
    return found


def moves(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an operator that only moves values (its first argument's) pass scaled and quantised tensors through."""

    def moved(value: Any, *rest: Any, **attributes: Any) -> Any:
        if isinstance(value, Scaled) and value.scale.numel() == 1:
            return _wrap(function(value.values, *rest, **attributes), value)
        if isinstance(value, Codes) and isinstance(value.zero_point, float):
            return _wrap(function(value.values, *rest, **attributes), value)
        return function(plain(value), *rest, **attributes)

    return moved


def scales(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an operator with f(s * x) = s * f(x) for every s > 0 pass scaled tensors through."""

    def scaled(value: Any, *rest: Any, **attributes: Any) -> Any:
        if isinstance(value, Scaled) and value.scale.numel() == 1:
            return _wrap(function(value.values, *rest, **attributes), value)
        return function(plain(value), *rest, **attributes)

    return scaled


def _wrap(found: Any, source: Scaled | Codes) -> Any:
    if isinstance(found, tuple):
        return tuple(_wrap(part, source) for part in found)
    if isinstance(source, Codes):
        return Codes(found, source.zero_point)
    return Scaled(found, source.scale, source.zero_point)  # in other places than the convolution's
