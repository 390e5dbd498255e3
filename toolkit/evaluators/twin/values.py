"""The values that flow through a twin besides plain tensors, and the straight-through rounding that makes them.

A quantised tensor is held as its integers in floating point, centred on the zero point. Integers up to 2^24 are exact
in float32, so that a convolution of centred integers, its int32 bias and the multiplication by
`scale_x * scale_w / scale_y` give the very numbers of ONNX Runtime's integer kernels, and they take few passes over
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


Value = Tensor | Scaled | Codes


def plain(value: Any) -> Any:
    """`value` as a tensor of what the graph holds there: real numbers, or the integers of a quantised tensor."""
    if isinstance(value, Scaled):
        return value.values * value.scale
    if isinstance(value, Codes):
        return value.values + value.zero_point
    return value


def along(values: Tensor, rank: int, axis: int) -> Tensor:
    """Per-channel `values` [C] shaped to broadcast against a tensor of `rank` axes; one value becomes a scalar."""
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[axis] = values.numel()
    return values.reshape(shape)


class _Round(torch.autograd.Function):
    """round(x * factor), halves to even, clipped to [low, high]; its gradient is `factor` inside and 0 outside.

    The straight-through estimator (Bengio et al. 2013). Outside of the range the gradient must vanish: quantisers
    absorb the ReLU in front of them, and their lower end is then the only non-linearity that the graph has.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: Tensor, divide: bool, low: float, high: float) -> Tensor:
        position = values / factor if divide else values * factor
        ctx.save_for_backward(position, factor)
        ctx.divide, ctx.ends = divide, (low - 0.5, high + 0.5)
        return position.clamp(low, high).round_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        position, factor = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(gradients[0], position, *ctx.ends)
        return inside.div_(factor) if ctx.divide else inside.mul_(factor), None, None, None, None


class _RoundPerChannel(torch.autograd.Function):
    """`_Round` of positions that are computed already, with ends that are tensors."""

    @staticmethod
    def forward(ctx: Any, position: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward((position >= low - 0.5) & (position <= high + 0.5))
        return position.round().clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


def round_to_grid(values: Tensor, factor: Tensor, low: Bound, high: Bound, *, divide: bool) -> Tensor:
    """Integers in [low, high] nearest to `values * factor` (or `values / factor`), with a straight-through gradient.

    Args:
        values: any shape.
        factor: positive, broadcastable, without a gradient.
        low: least integer.
        high: largest integer.
        divide: QuantizeLinear divides by its scale; requantisation multiplies by a ratio of scales.
    """
    if isinstance(low, float) and isinstance(high, float):
        rounded: Tensor = _Round.apply(values, factor, divide, low, high)
        return rounded
    position = values / factor if divide else values * factor
    ends = (torch.as_tensor(end, dtype=position.dtype, device=position.device) for end in (low, high))
    found: Tensor = _RoundPerChannel.apply(position, *ends)
    return found


def moves(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an operator that only moves values (its first argument's) pass scaled and quantised tensors through."""

    def moved(value: Any, *rest: Any, **attributes: Any) -> Any:
        if isinstance(value, Scaled) and value.scale.numel() == 1:
            return _wrap(function(value.values, *rest, **attributes), Scaled, value.scale)
        if isinstance(value, Codes) and isinstance(value.zero_point, float):
            return _wrap(function(value.values, *rest, **attributes), Codes, value.zero_point)
        return function(plain(value), *rest, **attributes)

    return moved


def scales(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an operator with f(s * x) = s * f(x) for every s > 0 pass scaled tensors through."""

    def scaled(value: Any, *rest: Any, **attributes: Any) -> Any:
        if isinstance(value, Scaled) and value.scale.numel() == 1:
            return _wrap(function(value.values, *rest, **attributes), Scaled, value.scale)
        return function(plain(value), *rest, **attributes)

    return scaled


def _wrap(found: Any, kind: Callable[[Tensor, Any], Any], extra: Any) -> Any:
    return tuple(kind(part, extra) for part in found) if isinstance(found, tuple) else kind(found, extra)
