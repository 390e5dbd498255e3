"""Reading an ONNX graph into the steps of a twin."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper
from torch import Tensor

from toolkit.evaluators.twin.network import Entry, Step, TwinNetwork
from toolkit.evaluators.twin.operators import OPERATORS, Unconvertible
from toolkit.evaluators.twin.values import HELD, Codes, Scaled, plain
from toolkit.exporters.interface import with_inferred_shapes
from toolkit.exporters.qoperator import INTEGER_KERNEL

ENDS: Mapping[int, tuple[float, float]] = {
    TensorProto.UINT8: (0.0, 255.0), TensorProto.INT8: (-128.0, 127.0), TensorProto.UINT4: (0.0, 15.0),
    TensorProto.INT4: (-8.0, 7.0), TensorProto.UINT16: (0.0, 65535.0), TensorProto.INT16: (-32768.0, 32767.0),
}  # fmt: skip
"""Least and largest integer of the types that quantisers write."""
ONNX_DOMAINS = ("", "ai.onnx")
QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
AFFINE = (
    "Add", "Sub", "Mul", "Div", "Neg", "Identity", "Cast", "BatchNormalization", "Transpose", "Reshape", "Flatten",
    "Squeeze", "Unsqueeze", "Slice", "Pad",
)  # fmt: skip
"""Operators that move, scale or shift pixels, where their other inputs are constants."""
UNCERTAIN = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")


class UnconvertibleOperators(Exception):
    """The graph holds operators that a twin does not have."""

    def __init__(self, operators: tuple[str, ...]) -> None:
        super().__init__(", ".join(operators))
        self.operators = operators


def read_network(model: ModelProto, entry: Entry, output: str, in_float: Collection[str] = frozenset()) -> TwinNetwork:
    """The module that computes `output` of a QDQ or float graph.

    Args:
        model: an ONNX graph, not changed.
        entry: its image input.
        output: the value wanted; what does not lead to it is left out.
        in_float: outputs of the layers between quantisers that the runtime computes in float.

    Raises:
        UnconvertibleOperators: with all operators that are missing.
    """
    return _Reader(model, entry, output, in_float).network()


class _Reader:
    def __init__(self, model: ModelProto, entry: Entry, output: str, in_float: Collection[str]) -> None:
        self._entry, self._output, self._in_float = entry, output, in_float
        self._nodes = needed_nodes(model, output)
        self._quantised = any(node.op_type == "QuantizeLinear" for node in self._nodes)
        self._opsets = {item.domain: item.version for item in model.opset_import}
        self._types = _value_types(model)
        self._static: dict[str, Any] = {item.name: read_tensor(item) for item in model.graph.initializer}
        self._scales: dict[str, Tensor] = {}
        """Scale of every activation that a DequantizeLinear with a constant scale gives."""
        self._missing: set[str] = set()
        self._pixels = {entry.name}
        """Values that are pixels, moved, scaled or shifted."""

    def network(self) -> TwinNetwork:
        steps = [step for step in map(self._read, self._nodes) if step is not None]
        if self._missing:
            raise UnconvertibleOperators(tuple(sorted(self._missing)))
        steps = _with_releases(steps, self._output)
        read = {name for step in steps for name in step.inputs} | {self._output}
        constants = {name: _floats(value) for name, value in self._static.items() if name in read}
        return TwinNetwork(steps, constants, self._entry, self._output)

    def _read(self, node: NodeProto) -> Step | None:
        """The step of a node; None if all its inputs are constants, and so its outputs."""
        name = node.op_type if node.domain in ONNX_DOMAINS else f"{node.domain}:{node.op_type}"
        try:
            if name not in OPERATORS:
                raise Unconvertible("no such operator")
            attributes, inputs = self._describe(node)
            function = OPERATORS[name](attributes)
        except Unconvertible as error:
            self._missing.add(name if name not in OPERATORS else f"{name} ({error})")
            return None
        step = Step(node.op_type, function, tuple(inputs), tuple(node.output), attributes)
        constant = all(not name or name in self._static for name in inputs)
        if constant and not self._missing and node.op_type not in UNCERTAIN:
            with torch.no_grad():
                found = function(*(self._static[name] if name else None for name in inputs))
            several = isinstance(found, tuple) and not isinstance(found, HELD)
            self._static.update(zip(node.output, found if several else (found,), strict=False))
            return None
        return step

    def _describe(self, node: NodeProto) -> tuple[dict[str, Any], list[str]]:
        attributes = read_attributes(node)
        attributes["opset"] = self._opsets.get(node.domain, self._opsets.get("", 1))
        inputs = list(node.input)
        pixels = [name for name in inputs if name in self._pixels]
        if node.op_type in AFFINE and pixels and all(n in self._static or n in pixels or not n for n in inputs):
            self._pixels.update(node.output)
        if node.op_type in QUANTISERS:
            if node.op_type == "QuantizeLinear":
                attributes["pixels"] = inputs[0] in self._pixels
            self._describe_quantiser(node, attributes, inputs)
        elif node.op_type in ("Conv", "Gemm") and node.domain in ONNX_DOMAINS:
            attributes["aligned"] = self._aligned(inputs)
            attributes["in_float"] = node.output[0] in self._in_float
        elif node.op_type == "LayerNormalization":
            attributes["quantised"] = self._quantised
        elif node.op_type == "Softmax":
            attributes["in_float"] = node.output[0] in self._in_float
        elif node.op_type == "Split":
            attributes["parts"] = len(node.output)
        elif node.op_type == "Clip":
            for position, end in enumerate(("min", "max"), start=1):
                if len(inputs) > position and inputs[position] in self._static:
                    attributes[end] = float(plain(self._static[inputs[position]]))
                    inputs[position] = ""
        return attributes, inputs

    def _describe_quantiser(self, node: NodeProto, attributes: dict[str, Any], inputs: list[str]) -> None:
        """Constant zero points become attributes; sets the ends of the integer type."""
        if attributes.get("block_size"):
            raise Unconvertible("scales per block")
        kind = self._types.get(node.output[0] if node.op_type == "QuantizeLinear" else node.input[0])
        if node.op_type == "QuantizeLinear":
            if kind is None or kind not in ENDS:
                raise Unconvertible(f"to {_type_name(kind)}")
            attributes["ends"] = ENDS[kind]
            # On x86, ONNX Runtime fuses sums and products of unsigned integers alone.
            marked = any(entry.key == INTEGER_KERNEL for entry in node.metadata_props)
            attributes["integer_kernel"] = marked or ENDS[kind][0] == 0
        elif kind is not None and kind not in ENDS and kind != TensorProto.INT32:
            raise Unconvertible(f"of {_type_name(kind)}")
        point = self._static.get(inputs[2]) if len(inputs) > 2 and inputs[2] else torch.zeros(1)
        if isinstance(point, Tensor) and bool((point == point.flatten()[0]).all()):
            attributes["offset"] = float(point.flatten()[0])
            del inputs[2:]
        scale = self._static.get(inputs[1])
        if node.op_type == "DequantizeLinear" and isinstance(scale, Tensor):
            self._scales[node.output[0]] = scale

    def _aligned(self, inputs: list[str]) -> bool:
        """Whether a layer's quantised bias is in units of its sums, as integer kernels need it."""
        weight, bias = (self._static.get(name) for name in (*inputs, "")[1:3])
        activation = self._scales.get(inputs[0])
        if activation is None or not isinstance(weight, Scaled) or not isinstance(bias, Scaled):
            return False
        product = (activation.flatten() * weight.scale.flatten()).broadcast_to(bias.values.numel())
        return bool(torch.isclose(product, bias.scale.flatten(), rtol=1e-5, atol=0).all())


def needed_nodes(model: ModelProto, output: str) -> list[NodeProto]:
    """The nodes that lead to `output`, each behind what it reads; local functions are written out.

    Runtimes take nodes in any order, and some converters append theirs at the end.
    """
    if model.functions:
        model = inliner.inline_local_functions(model)
    maker = {name: number for number, node in enumerate(model.graph.node) for name in node.output if name}
    chosen: dict[int, None] = {}
    waiting = [(maker[output], False)] if output in maker else []
    while waiting:
        number, ready = waiting.pop()
        if ready:
            chosen[number] = None
        elif number not in chosen:
            waiting.append((number, True))
            reads = {maker[name] for name in model.graph.node[number].input if name in maker}
            waiting += [(other, False) for other in sorted(reads, reverse=True) if other not in chosen]
    return [model.graph.node[number] for number in chosen]


def read_tensor(item: TensorProto) -> Tensor:
    """A constant as a tensor; floating ones in float32, integers in int64."""
    array = np.asarray(numpy_helper.to_array(item))
    if array.dtype.kind in "OSU":
        raise Unconvertible("strings")
    if array.dtype == bool:
        return torch.from_numpy(array.copy())
    whole = item.data_type in ENDS or array.dtype.kind in "iu"
    return torch.from_numpy(array.astype(np.int64 if whole else np.float32, order="C"))


def read_attributes(node: NodeProto) -> dict[str, Any]:
    """The attributes of a node as Python values.

    Raises:
        Unconvertible: one of them is a graph.
    """
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
            raise Unconvertible("graphs within the graph")
        value = helper.get_attribute_value(attribute)
        if isinstance(value, TensorProto):
            value = read_tensor(value)
        found[attribute.name] = value.decode() if isinstance(value, bytes) else value
    return found


def _value_types(model: ModelProto) -> dict[str, int]:
    """The element type of every tensor that is known to have one."""
    inferred = with_inferred_shapes(model).graph
    types = {item.name: item.data_type for item in inferred.initializer}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        types[value.name] = value.type.tensor_type.elem_type
    for node in inferred.node:
        if node.op_type == "QuantizeLinear" and len(node.input) > 2 and node.input[2] in types:
            types[node.output[0]] = types[node.input[2]]
    return types


def _type_name(kind: int | None) -> str:
    return "an unknown type" if kind is None else str(TensorProto.DataType.Name(kind)).lower()


def _floats(value: Any) -> Any:
    """Integers of quantised constants that nothing has dequantised stay integers; scaled ones are floating already."""
    return plain(value) if isinstance(value, Codes) else value


def _with_releases(steps: list[Step], output: str) -> list[Step]:
    last: dict[str, int] = {}
    for number, step in enumerate(steps):
        last.update(dict.fromkeys((*step.inputs, *step.outputs), number))
    last.pop(output, None)
    freed: Mapping[int, list[str]] = {number: [] for number in range(len(steps))}
    for name, number in last.items():
        if name:
            freed[number].append(name)
    return [replace(step, release=tuple(freed[number])) for number, step in enumerate(steps)]
