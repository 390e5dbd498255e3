"""Small ONNX graphs for tests, written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8
Shape = Sequence[int | str] | None


def node(
    operator: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: Any
) -> NodeProto:
    """One node."""
    return helper.make_node(operator, list(inputs), list(outputs), domain=domain, **attributes)


def model(
    nodes: Sequence[NodeProto],
    constants: Mapping[str, Any],
    *,
    shape: Shape = ("N", 3, 6, 6),
    kind: int = FLOAT,
    outputs: Mapping[str, tuple[int, Shape]] | None = None,
    opset: int = 20,
) -> ModelProto:
    """A graph from `image` to `logits`; constants keep their numpy type."""
    results = outputs or {"logits": (FLOAT, None)}
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info(name, found, size) for name, (found, size) in results.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def save(made: ModelProto, path: Path) -> Path:
    """Write a graph to `path`."""
    onnx.save(made, path)
    return path


def f32(*values: float) -> Any:
    """A float32 vector; one value: a scalar."""
    return np.float32(values[0]) if len(values) == 1 else np.array(values, np.float32)


def floats(values: Any) -> Any:
    """A float32 array."""
    return np.array(values, np.float32)


def i64(values: Any) -> Any:
    """An int64 array."""
    return np.array(values, np.int64)


def i32(values: Any) -> Any:
    """An int32 array."""
    return np.array(values, np.int32)


def u8(values: Any) -> Any:
    """A uint8 array."""
    return np.array(values, np.uint8)


def weights(*shape: int, seed: int = 0) -> Any:
    """Small float32 weights."""
    return (np.random.default_rng(seed).normal(size=shape) * 0.3).astype(np.float32)


def integers(*shape: int, kind: Any = np.int8, seed: int = 0) -> Any:
    """Integers of all sizes of their type."""
    ends = np.iinfo(kind)
    return np.random.default_rng(seed).integers(ends.min, int(ends.max) + 1, shape).astype(kind)


def qdq_classifier(*, input_scale: float = 1 / 255, tail: bool = True, bias_units: float = 1.0) -> ModelProto:
    """Quantiser, integer convolution, quantiser, integer Gemm with float logits: as integer classifiers are written."""
    weight_scale = np.linspace(0.002, 0.004, 4).astype(np.float32)
    constants = {
        "s0": f32(input_scale), "z0": np.uint8(0), "w1": integers(4, 3, 3, 3), "ws1": weight_scale,
        "wz1": np.zeros(4, np.int8), "b1": integers(4, kind=np.int16).astype(np.int32),
        "bs1": (np.float32(input_scale) * weight_scale * np.float32(bias_units)).astype(np.float32), "s1": f32(0.004),
        "z1": np.uint8(100), "w2": integers(5, 4 * 36, seed=1), "ws2": f32(0.003), "wz2": np.int8(0),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["image", "s0", "z0"], ["q0"]),
        node("DequantizeLinear", ["q0", "s0", "z0"], ["x0"]),
        node("DequantizeLinear", ["w1", "ws1", "wz1"], ["weight1"], axis=0),
        node("DequantizeLinear", ["b1", "bs1"], ["bias1"], axis=0),
        node("Conv", ["x0", "weight1", "bias1"], ["y1"], pads=[1, 1, 1, 1]),
        node("QuantizeLinear", ["y1", "s1", "z1"], ["q1"]),
        node("DequantizeLinear", ["q1", "s1", "z1"], ["x1"]),
        node("Flatten", ["x1"], ["flat"]),
        node("DequantizeLinear", ["w2", "ws2", "wz2"], ["weight2"]),
        node("Gemm", ["flat", "weight2"], ["logits" if tail else "raw"], transB=1),
    ]
    return model(nodes, constants)
