"""The input quantiser of an integer graph: which pixels it represents, and how to make it cover a margin.

The normalisation (x - mean) / std stands in front of the first quantiser. Where mean / step is an integer for the step
of the quantiser in pixels, both fold into the quantiser exactly:

    round((x - mean) / step) + zero_point  =  round(x / step) + zero_point - mean / step
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from toolkit.exporters.onnx import load_onnx

LEVELS = 255
"""The largest value of uint8."""
SIGNED_LEVELS = 127
"""The largest value of int8."""
LOSS = 1.35
"""A folded quantiser may be coarser than the finest one by this factor; beyond it the normalisation stays float."""

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PixelMap:
    """The tensor that the first quantiser sees: `scale * pixel + shift`, per channel."""

    tensor: str
    scale: Float64Array
    shift: Float64Array
    nodes: tuple[NodeProto, ...]
    """The affine nodes between the graph's input and that tensor, in order."""

    def of(self, pixel: float) -> Float64Array:
        return self.scale * pixel + self.shift

    def pixel(self, value: float | Float64Array) -> Float64Array:
        return (value - self.shift) / self.scale


@dataclass(frozen=True)
class InputGrid:
    """A uint8 quantiser: value = step * (q - zero_point), with one step per channel or one for all."""

    step: Float64Array
    zero_point: int


def pixel_map(model: ModelProto) -> PixelMap:
    """Follow the per-channel affine nodes (normalisation) from the graph's input to where something else begins."""
    constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    consumers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in () if node.op_type == "Shape" else node.input:  # Shape reads no values
            consumers.setdefault(name, []).append(node)
    tensor = model.graph.input[0].name
    scale, shift = np.ones(1), np.zeros(1)
    chain: list[NodeProto] = []
    while True:
        following = consumers.get(tensor, [])
        step = _affine(following[0], tensor, constants) if len(following) == 1 else None
        if step is None:
            return PixelMap(tensor, scale, shift, tuple(chain))
        scale, shift = scale * step[0], shift * step[0] + step[1]
        chain.append(following[0])
        tensor = following[0].output[0]


def _affine(
    node: NodeProto, tensor: str, constants: dict[str, npt.NDArray[np.generic]]
) -> tuple[Float64Array, Float64Array] | None:
    """(factor, summand) per channel of a node that computes factor * tensor + summand; None for any other node."""
    if node.op_type not in {"Sub", "Add", "Mul", "Div"} or len(node.input) != 2:
        return None
    first = node.input[0] == tensor
    other = constants.get(node.input[1] if first else node.input[0])
    if other is None or (not first and node.op_type in {"Sub", "Div"}):
        return None
    per_channel = other.ndim == 4 and other.shape[0] == other.shape[2] == other.shape[3] == 1
    if other.size != 1 and not per_channel:
        return None
    value = other.astype(np.float64).ravel()
    one, zero = np.ones_like(value), np.zeros_like(value)
    if node.op_type in {"Sub", "Add"}:
        return one, value if node.op_type == "Add" else -value
    if not value.all():
        return None
    return value if node.op_type == "Mul" else 1 / value, zero


def covering_grid(low: float, high: float, levels: int = LEVELS) -> InputGrid:
    """The finest grid of `levels` steps (uint8's) that has 0 on it and represents all of [low, high], 0 included."""
    low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:
        return InputGrid(np.ones(1), 0)
    nearest = np.clip(-low / (high - low) * levels, 1 if low < 0 else 0, levels - 1 if high > 0 else levels)
    step, zero_point = min(
        (max(-low / max(zero_point, 1), high / max(levels - zero_point, 1)), zero_point)
        for zero_point in {int(np.floor(nearest)), int(np.ceil(nearest))}
    )
    return InputGrid(np.array([step]), zero_point)


def symmetric_grid(low: float, high: float) -> InputGrid:
    """The finest int8 grid with zero point 0, whose levels are -127 to 127, that represents all of [low, high]."""
    reach = max(-low, high, 0.0)
    return InputGrid(np.array([reach / SIGNED_LEVELS if reach else 1.0]), 0)


def folding_grid(mean: Float64Array, margin: float) -> tuple[InputGrid, int] | None:
    """The finest pixel grid that covers [-margin, 1 + margin] with every channel's mean a whole number of steps from 0.

    Returns:
        the grid (one step per channel, in pixels) and mean / step, the same integer for all channels; None where there
        is no such grid, or where it would be much coarser than one that leaves the normalisation outside.
    """
    if mean.min() <= 0:
        return None
    finest = (1 + 2 * margin) / LEVELS
    for steps in range(LEVELS, 0, -1):
        step = mean / steps
        if step.max() > LOSS * finest:
            return None
        zero_point = int(np.ceil(margin / step.min() - 1e-9))
        covered = (LEVELS - zero_point) * step.min() >= 1 + margin - 1e-9
        if covered and zero_point + steps <= LEVELS:
            return InputGrid(step, zero_point), steps
    return None


def input_range(path: Path) -> tuple[float, float] | None:
    """The interval of pixel values that the input quantiser of an integer graph represents, in all channels.

    None: the graph does not begin with a quantiser (behind at most a per-channel normalisation).
    """
    model = load_onnx(path)
    mapping = pixel_map(model)
    quantiser = next(
        (node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == mapping.tensor),
        None,
    )
    constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    if quantiser is None or quantiser.input[1] not in constants:
        return None
    scale = constants[quantiser.input[1]].astype(np.float64).ravel()
    zero_point = constants[quantiser.input[2]] if len(quantiser.input) > 2 else np.zeros(1, np.uint8)
    limits = np.iinfo(zero_point.dtype)
    offset = zero_point.astype(np.float64).ravel()
    ends = mapping.pixel((limits.min - offset) * scale), mapping.pixel((limits.max - offset) * scale)
    return float(np.minimum(*ends).max()), float(np.maximum(*ends).min())
