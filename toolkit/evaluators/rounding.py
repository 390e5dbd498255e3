"""Rounding floats to the grids that integers would have, with straight-through gradients (Bengio et al. 2013)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.artifacts import Normalization
from toolkit.exporters.input_range import covering_grid

TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Grid:
    """The values `origin + step * k` for the whole numbers k from `lowest` to `highest`."""

    step: float
    lowest: int
    highest: int
    origin: float = 0.0
    """0 lies on every grid, as integer kernels need it, but on that of one bit for values of both signs."""


def activation_grid(low: float, high: float, bits: int) -> Grid:
    """The asymmetric grid of 2^bits values over [low, high], 0 included, as ONNX Runtime's min-max calibration sets it.

    Args:
        low: least value observed.
        high: largest value observed.
        bits: 1 to 16. One bit for values of both signs has the two values `low` and `high`.
    """
    low, high, levels = min(low, 0.0), max(high, 0.0), 2**bits - 1
    if high - low < TINY:  # nothing but 0, as behind a dead ReLU
        return Grid(1.0, 0, levels)
    if bits == 1 and low < 0 < high:
        return Grid(high - low, 0, 1, origin=low)
    step = (high - low) / levels
    zero_point = round(-low / step)
    return Grid(step, -zero_point, levels - zero_point)


def pixel_grid(normalization: Normalization, margin: float, bits: int) -> Grid:
    """The grid of normalised pixels: it covers [-margin, 1 + margin] in every channel, whatever calibration saw.

    Args:
        normalization: in front of the network.
        margin: pixels by which attacked images may leave [0, 1].
        bits: 1 to 16.
    """
    pairs = list(zip(normalization.mean, normalization.std, strict=True))
    low = min((-margin - mean) / std for mean, std in pairs)
    high = max((1 + margin - mean) / std for mean, std in pairs)
    if bits == 1:
        return activation_grid(low, high, bits)
    found = covering_grid(low, high, 2**bits - 1)
    return Grid(float(found.step[0]), -found.zero_point, 2**bits - 1 - found.zero_point)


class _RoundStraightThrough(torch.autograd.Function):
    """Rounds to a grid; the gradient passes unchanged within the window, and is 0 where values are clipped.

    torch's own `fake_quantize_per_tensor_affine` computes the same one value at a time, 17 times slower in bfloat16.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, grid: Grid, rectify: bool) -> Tensor:
        half = grid.step / 2
        ctx.low = 0.0 if rectify else grid.origin + grid.step * grid.lowest - half
        ctx.high = grid.origin + grid.step * grid.highest + half
        ctx.save_for_backward(values)
        shifted = values - grid.origin if grid.origin else values
        rounded = shifted.mul(1 / grid.step).round_().clamp_(grid.lowest, grid.highest).mul_(grid.step)
        return rounded.add_(grid.origin) if grid.origin else rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (values,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradient, values, ctx.low, ctx.high), None, None


def round_to(values: Tensor, grid: Grid, *, rectify: bool = False) -> Tensor:
    """`values`, of any shape and float dtype, rounded to the nearest of `grid` (ties to even), straight-through.

    Args:
        values: any floats; what lies beyond the grid's ends is clipped, and has no gradient beyond half a step.
        grid: of activations.
        rectify: the rounding is a ReLU's as well, on a grid that begins at 0: the gradient is the ReLU's.
    """
    rounded: Tensor = _RoundStraightThrough.apply(values, grid, rectify)
    return rounded


def quantise_weights(weights: Tensor, bits: int, *, per_channel: bool = True) -> Tensor:
    """Weights float32 [out, ...] rounded to a symmetric grid: 2^(bits-1) - 1 steps either side, as ONNX Runtime does.

    7 bits are its reduced range, which has 64 steps either side, not 63.
    One bit means plus or minus the mean magnitude (Rastegari et al. 2016), two mean {-scale, 0, scale}. Scales per
    output channel commute with a batch norm that follows: folding it in multiplies each channel and its scale alike,
    so that the integers are the same. Scales per tensor do not; with them a folded graph has other integers.

    Args:
        weights: of a convolution or a linear layer.
        bits: 1 to 16.
        per_channel: one scale for each output channel, else one for all.
    """
    axes = tuple(range(1 if per_channel else 0, weights.ndim))
    magnitude = weights.abs()
    if bits == 1:
        scale = magnitude.mean(dim=axes, keepdim=True)
        return torch.where(weights >= 0, scale, -scale)
    steps = 64 if bits == 7 else 2 ** (bits - 1) - 1
    scale = (magnitude.amax(dim=axes, keepdim=True) / steps).clamp_min(TINY)
    rounded: Tensor = (weights / scale).round().clamp(-steps, steps) * scale
    return rounded
