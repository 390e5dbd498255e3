"""The last touches to a graph in QDQ form, whichever engine made it."""

from __future__ import annotations

from collections.abc import Collection

from onnx import ModelProto, helper

from toolkit.exporters.precision import COMPUTE
from toolkit.exporters.rewrites import remove_unused_initializers, strip_metadata

UNQUANTISED = frozenset({"Gemm", "MatMul"})
"""Layers whose output has no quantiser where no other layer follows."""
PASSED = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool")
"""Operators behind which ONNX Runtime moves the dequantiser before them."""


def keep_logits_float(model: ModelProto) -> None:
    """Take the output quantiser off every Gemm and MatMul that no other layer follows, in place."""
    reaches: set[str] = set()
    last: set[str] = set()
    for node in reversed(model.graph.node):
        if node.op_type in COMPUTE or any(name in reaches for name in node.output):
            if node.op_type in UNQUANTISED and node.output[0] not in reaches:
                last.add(node.output[0])
            reaches.update(node.input)
    quantisers = {node.output[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}
    removed = set()
    for node in list(model.graph.node):
        quantiser = quantisers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantiser is not None and quantiser.input[0] in last:
            removed |= {node.output[0], quantiser.output[0]}
            _rename(model, quantiser.input[0], node.output[0])
    kept = [node for node in model.graph.node if not (node.output[0] in removed and node.op_type.endswith("Linear"))]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def keep_islands_float(model: ModelProto, kept: Collection[str]) -> None:
    """Put an identity that is not recognised as one behind float layers between two quantisers, in place.

    ONNX Runtime quantises the weights of such a layer itself, with one scale for all (its WeightBiasQuantization, found
    in 1.31). A LeakyRelu of slope 1 behind the layer keeps it from that, and is fused into the layer's float kernel.
    """
    dequantised = set[str]()
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" or (node.op_type in PASSED and node.input[0] in dequantised):
            dequantised.add(node.output[0])
    for index in range(len(model.graph.node) - 1, -1, -1):
        node = model.graph.node[index]
        if node.name in kept and node.input[0] in dequantised:
            result = node.output[0]
            node.output[0] = f"{result}_float"
            same = helper.make_node("LeakyRelu", [node.output[0]], [result], name=f"{node.name}_float", alpha=1.0)
            model.graph.node.insert(index + 1, same)


def _rename(model: ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == old:
                node.output[index] = new


def finish(model: ModelProto, source: ModelProto) -> None:
    """Strip what engines leave behind and give the graph the metadata of its float twin, in place."""
    remove_unused_initializers(model.graph)
    del model.graph.value_info[:]  # names of float tensors that are gone
    strip_metadata(model)
    used = {node.domain for node in model.graph.node}  # onnxruntime declares every domain that it knows
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    model.producer_name, model.producer_version = source.producer_name, source.producer_version
    helper.set_model_props(model, {entry.key: entry.value for entry in source.metadata_props})
