"""The precision that every layer of a QDQ graph stands in, and what in it is not as it should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

COMPUTE = ("Conv", "Gemm", "MatMul")
"""The layers: operators that multiply and accumulate."""


@dataclass(frozen=True, slots=True)
class LayerPrecision:
    """One layer with weights (or a product of activations) and the precision it stands in."""

    name: str
    operator: str
    precision: Literal["int8", "float32"]


def layer_precision(model: ModelProto) -> tuple[LayerPrecision, ...]:
    """Every Conv, Gemm and MatMul of a QDQ graph: int8 where both factors come out of a DequantizeLinear."""
    dequantised = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return tuple(
        LayerPrecision(node.name, node.op_type, "int8" if set(node.input[:2]) <= dequantised else "float32")
        for node in model.graph.node
        if node.op_type in COMPUTE
    )


def precision_faults(model: ModelProto, *, per_channel: bool = True) -> tuple[str, ...]:
    """What in a QDQ graph is not int8 symmetric weights (per output channel) and uint8 activations; empty: nothing."""
    constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    faults = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and len(node.input) > 2 and constants[node.input[2]].dtype != np.uint8:
            faults.append(f"{node.name}: activations are {constants[node.input[2]].dtype}, not uint8")
        if node.op_type not in COMPUTE:
            continue
        source = producers.get(node.input[1])
        if source is None or source.op_type != "DequantizeLinear":
            faults.append(f"{node.name}: its weights are float")
        elif source.input[0] in constants:
            faults.extend(f"{node.name}: {fault}" for fault in _weight_faults(source, constants, per_channel))
    return tuple(faults)


def _weight_faults(dequantise: NodeProto, constants: dict[str, Any], per_channel: bool) -> list[str]:
    weights, scale = constants[dequantise.input[0]], constants[dequantise.input[1]]
    zero_point = constants[dequantise.input[2]] if len(dequantise.input) > 2 else np.zeros(1, weights.dtype)
    axis = next((attribute.i for attribute in dequantise.attribute if attribute.name == "axis"), 1)
    faults = []
    if weights.dtype != np.int8:
        faults.append(f"weights are {weights.dtype}, not int8")
    if np.any(zero_point != 0):
        faults.append("weights are asymmetric")
    if per_channel and scale.size != weights.shape[axis]:
        faults.append(f"{scale.size} scale(s) for {weights.shape[axis]} channels")
    return faults
