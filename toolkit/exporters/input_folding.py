"""Fold the normalisation in front of a graph into its input quantiser; `input_range` has the mathematics."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from toolkit.exporters.input_range import InputGrid, PixelMap, folding_grid
from toolkit.exporters.rewrites import remove_unused_initializers


def read_shape_from_image(model: ModelProto, mapping: PixelMap) -> None:
    """Let Shape nodes read the image instead of the normalised image, which has the same shape, in place."""
    normalised = {node.output[0] for node in mapping.nodes}
    for node in model.graph.node:
        if node.op_type == "Shape" and node.input[0] in normalised:
            node.input[0] = model.graph.input[0].name


@dataclass(frozen=True, slots=True)
class Folded:
    """The quantiser of the pixels, and how many of its steps the mean is."""

    quantiser: InputGrid
    mean_steps: int


def fold_normalization(model: ModelProto, mapping: PixelMap, margin: float) -> Folded | None:
    """Rescale, in place, what the first convolutions read to whole steps of the pixel grid, and their weights back.

    Returns None, and changes nothing, where the normalisation cannot be folded into the quantiser.
    """
    consumers = [node for node in model.graph.node if mapping.tensor in node.input]
    weights = {item.name: item for item in model.graph.initializer}
    readers = Counter(name for node in model.graph.node for name in node.input)
    plain = all(
        node.op_type == "Conv" and node.input[1] in weights and readers[node.input[1]] == 1 and _group(node) == 1
        for node in consumers
    )
    found = folding_grid(-mapping.shift / mapping.scale, margin) if mapping.nodes and plain and consumers else None
    if found is None:
        return None
    quantiser, mean_steps = found
    factor = mapping.scale * quantiser.step  # one step of the grid, in normalised units
    for node in consumers:
        old = weights[node.input[1]]
        scaled = numpy_helper.to_array(old) * factor.reshape(1, -1, 1, 1)
        old.CopyFrom(numpy_helper.from_array(scaled.astype(np.float32), old.name))
    mean, step = (f"{mapping.tensor}_{part}" for part in ("mean", "step"))
    shape = (1, -1, 1, 1)
    model.graph.initializer.append(_constant(mean, (mean_steps * quantiser.step).reshape(shape)))
    model.graph.initializer.append(_constant(step, quantiser.step.reshape(shape)))
    _replace_chain(
        model,
        mapping,
        [
            helper.make_node("Sub", [model.graph.input[0].name, mean], [f"{mapping.tensor}_centred"], "normalize_sub"),
            helper.make_node("Div", [f"{mapping.tensor}_centred", step], [mapping.tensor], "normalize_div"),
        ],
    )
    return Folded(quantiser, mean_steps)


def _group(node: NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


def _constant(name: str, values: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype=np.float32), name)


def _replace_chain(model: ModelProto, mapping: PixelMap, replacement: list[NodeProto]) -> None:
    old = {node.output[0] for node in mapping.nodes}
    kept = [node for node in model.graph.node if node.output[0] not in old]
    del model.graph.node[:]
    model.graph.node.extend([*replacement, *kept])
    remove_unused_initializers(model.graph)


def move_quantiser_to_pixels(model: ModelProto, mapping: PixelMap, grid: InputGrid) -> None:
    """Put the quantiser of the pixels in the place of the float normalisation and its quantiser, in place."""
    (old,) = [node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == mapping.tensor]
    one_for_all = bool(np.ptp(grid.step) == 0)
    step = grid.step[0] if one_for_all else grid.step
    zero_point = np.full(np.shape(step), grid.zero_point, dtype=np.uint8)
    model.graph.initializer.append(_constant("image_scale", step))
    model.graph.initializer.append(numpy_helper.from_array(zero_point, "image_zero_point"))
    image = model.graph.input[0].name
    inputs = [image, "image_scale", "image_zero_point"]
    new = helper.make_node("QuantizeLinear", inputs, [old.output[0]], "image_QuantizeLinear")
    if not one_for_all:
        new.attribute.append(helper.make_attribute("axis", 1))
    drop = {old.output[0], mapping.tensor, f"{mapping.tensor}_centred"}
    kept = [node for node in model.graph.node if node.output[0] not in drop]
    del model.graph.node[:]
    model.graph.node.extend([new, *kept])
