"""int4 weights where ONNX Runtime multiplies them: linear layers, which it turns into MatMulNBits.

That kernel reads float activations and rounds them to int8 itself, in blocks, so that such a layer has no quantiser in
front of it. Convolutions have no int4 kernel (in 1.31 their weights would be unpacked to float at every run), and stay
int8.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from toolkit.exporters.rewrites import remove_unused_initializers

OPSET, IR_VERSION = 21, 10
"""The first whose DequantizeLinear takes int4."""
MOST = 7
"""Symmetric: -7 to 7, as int8 has -127 to 127."""
FUSED = (
    "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Elu", "Selu", "HardSigmoid", "Softplus", "Softsign", "ThresholdedRelu",
)  # fmt: skip
"""Activations that ONNX Runtime fuses with a float Gemm before it looks at the weights. A Max of one tensor between the
two keeps them apart (a Clip without ends does not, and other identities are removed; 1.31)."""

INT4 = helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
Matrix = npt.NDArray[np.float32]


def four_bit_layers(model: ModelProto) -> tuple[str, ...]:
    """The names of the layers whose weights can be int4: products with a constant matrix."""
    constants = _constants(model)
    return tuple(node.name for node in model.graph.node if _weights(node, constants) is not None)


def pack_four_bits(model: ModelProto, layers: Collection[str]) -> ModelProto:
    """A copy of a graph in which the weights of `layers` are int4, symmetric, with one scale per output channel.

    Args:
        model: in QDQ form, its layers in question float.
        layers: of `four_bit_layers`.
    """
    converted = model
    opset = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset.version < OPSET:
        converted = onnx.version_converter.convert_version(model, OPSET)
    packed = ModelProto()
    packed.CopyFrom(converted)
    packed.ir_version = max(packed.ir_version, IR_VERSION)
    constants = _constants(packed)
    for index in range(len(packed.graph.node) - 1, -1, -1):
        node = packed.graph.node[index]
        weights = _weights(node, constants) if node.name in layers else None
        if weights is not None:
            del packed.graph.node[index]
            for offset, new in enumerate(_packed(packed, node, weights)):
                packed.graph.node.insert(index + offset, new)
    remove_unused_initializers(packed.graph)
    return packed


def _constants(model: ModelProto) -> dict[str, TensorProto]:
    return {item.name: item for item in model.graph.initializer}


def _weights(node: NodeProto, constants: Mapping[str, TensorProto]) -> Matrix | None:
    """The float matrix [inputs, outputs] that a layer multiplies by; None where it is none."""
    if node.op_type not in ("Gemm", "MatMul") or node.input[1] not in constants:
        return None
    matrix = numpy_helper.to_array(constants[node.input[1]])
    if matrix.ndim != 2 or matrix.dtype != np.float32:
        return None
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1 or attributes.get("beta", 1.0) != 1:
        return None
    return matrix.T if attributes.get("transB", 0) else matrix


def _packed(model: ModelProto, node: NodeProto, weights: Matrix) -> list[NodeProto]:
    """A layer with its weights behind a DequantizeLinear, in place of a float one."""
    scale = np.maximum(np.abs(weights).max(0), np.finfo(np.float32).tiny) / MOST
    rounded = np.clip(np.rint(weights / scale), -MOST, MOST).astype(INT4)
    stem = node.name or node.output[0]
    names = [f"{stem}_weight_{part}" for part in ("int4", "scale", "zero_point")]
    zeros = np.zeros(len(scale), INT4)
    for name, values in zip(names, (rounded, scale.astype(np.float32), zeros), strict=True):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    matrix, result = f"{stem}_weight", node.output[0]
    apart = any(other.op_type in FUSED and result in other.input for other in model.graph.node)
    made = f"{result}_apart" if apart else result
    inputs = [node.input[0], matrix, *node.input[2:]]
    nodes = [
        helper.make_node("DequantizeLinear", names, [matrix], f"{stem}_DequantizeLinear", axis=1),
        helper.make_node(node.op_type, inputs, [made], node.name),
    ]
    return [*nodes, helper.make_node("Max", [made], [result], f"{stem}_apart")] if apart else nodes
