"""What TensorRT wants of a quantised graph: symmetric int8 on both sides (S8S8), every zero point 0, biases in float.

Quantisers stand in front of the layers that multiply and nowhere else: TensorRT moves them over what commutes with
them, and fuses a layer with the activation behind it only where no quantiser parts the two. The normalisation stays
float, with a symmetric quantiser behind it. No TensorRT runs here: the graph is checked against these rules, and by
ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from toolkit.exporters.input_range import PixelMap
from toolkit.exporters.precision import COMPUTE

MOST = 127
OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "QuantizeBias": False,
    "DedicatedQDQPair": True,
    "OpTypesToExcludeOutputQuantization": list(COMPUTE),
}
"""For onnxruntime's quantiser."""


def symmetric_options(mapping: PixelMap, margin: float) -> dict[str, Any]:
    """`OPTIONS`, with an input quantiser that represents every pixel in [-margin, 1 + margin]."""
    end = float(np.abs([mapping.of(-margin), mapping.of(1 + margin)]).max())
    grid = {"scale": np.array(end / MOST, dtype=np.float32), "zero_point": np.array(0, dtype=np.int8)}
    return {**OPTIONS, "TensorQuantOverrides": {mapping.tensor: [grid]}}


def tensorrt_faults(model: ModelProto, *, kept: Collection[str] = ()) -> tuple[str, ...]:
    """What in a graph TensorRT's explicit quantisation would refuse or run in float; empty: nothing.

    Args:
        model: in QDQ form.
        kept: the layers that may be float.
    """
    constants = {item.name: item for item in model.graph.initializer}
    dequantised = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    faults = [f"{node.name}: domain {node.domain}" for node in model.graph.node if node.domain not in ("", "ai.onnx")]
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            faults.extend(f"{node.name}: {fault}" for fault in _quantiser_faults(node, constants))
        elif node.op_type in COMPUTE and node.name not in kept:
            if not set(node.input[:2]) <= dequantised:
                faults.append(f"{node.name}: an input is not quantised")
            if len(node.input) > 2 and node.input[2] in dequantised:
                faults.append(f"{node.name}: its bias is quantised")
    return tuple(faults)


def _quantiser_faults(node: NodeProto, constants: dict[str, TensorProto]) -> list[str]:
    faults = []
    point = constants.get(node.input[2]) if len(node.input) > 2 else None
    if point is None:
        faults.append("its zero point is no constant")
    elif point.data_type != TensorProto.INT8:
        faults.append(f"it is {TensorProto.DataType.Name(point.data_type).lower()}, not int8")
    elif np.any(numpy_helper.to_array(point) != 0):
        faults.append("its zero point is not 0")
    scale = constants.get(node.input[1])
    if scale is None or not np.all(numpy_helper.to_array(scale) > 0):
        faults.append("its scale is no positive constant")
    return faults
