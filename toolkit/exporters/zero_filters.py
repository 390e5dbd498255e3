"""Filters of zeros in a QDQ graph: their scale is free, and onnxruntime's 1 makes units of their bias far too coarse.

A bias is an int32 in units of the input's scale times the filter's. Where all weights of a filter are 0, onnxruntime
sets its scale to 1 (or to next to nothing), and a bias of 0.7 may become 1. With the largest scale of the layer's other
filters the bias is as fine as theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from toolkit.exporters.precision import COMPUTE

FINEST = 2.0**20
"""Steps of a bias where no other filter gives a unit; far from the ends of int32, and finer than float activations."""


def refine_biases(model: ModelProto, source: ModelProto) -> None:
    """Give filters of zeros a scale, and their biases integers in its units, in place.

    Args:
        model: a graph in QDQ form.
        source: the float graph that it was made of; nodes have the same names.
    """
    constants = {item.name: item for item in model.graph.initializer}
    biases = {item.name: item for item in source.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    floats = {node.name: node.input[2] for node in source.graph.node if len(node.input) > 2}
    for node in model.graph.node:
        if node.op_type not in COMPUTE or floats.get(node.name) not in biases:
            continue
        parts = [makers.get(name) for name in node.input[:3]]
        if all(part is not None and part.op_type == "DequantizeLinear" for part in parts):
            image, weight, bias = (part for part in parts if part is not None)
            if {image.input[1], *weight.input[:2], *bias.input[:2]} <= set(constants):
                _refine(image, weight, bias, constants, numpy_helper.to_array(biases[floats[node.name]]))


def _refine(image: NodeProto, weight: NodeProto, bias: NodeProto, constants: dict[str, Any], wanted: Any) -> None:
    integers, scale = (numpy_helper.to_array(constants[name]) for name in weight.input[:2])
    axis = next((attribute.i for attribute in weight.attribute if attribute.name == "axis"), 1)
    others = tuple(other for other in range(integers.ndim) if scale.size == 1 or other != axis)
    zeros = ~integers.any(axis=others)
    if not zeros.any():
        return
    step = float(numpy_helper.to_array(constants[image.input[1]]).ravel()[0])
    given = scale[~zeros] if scale.ndim else np.zeros(0, np.float32)
    largest = float(np.abs(wanted).max())
    unit = float(given.max()) if given.size else max(largest, 1e-6) / (step * FINEST)
    unit = max(unit, largest / (step * 2.0**30))
    refined = np.where(zeros, np.float32(unit), scale).astype(np.float32)
    steps = (np.float32(step) * refined).astype(np.float32)
    values = numpy_helper.to_array(constants[bias.input[0]])
    units = np.broadcast_to(np.rint(wanted / steps), values.shape)
    changed = np.where(np.broadcast_to(zeros, values.shape), units, values)
    for name, new in (
        (weight.input[1], refined.reshape(scale.shape)),
        (bias.input[0], changed.astype(np.int32)),
        (bias.input[1], steps.reshape(constants[bias.input[1]].dims)),
    ):
        constants[name].CopyFrom(numpy_helper.from_array(new, name))
