"""QOperator graphs to QDQ graphs: every integer operator as DequantizeLinear, a float operator and QuantizeLinear.

Both forms have the same function, up to rounding (ONNX Runtime's own optimiser goes from the second to the first). The
fused float operators of graphs that ONNX Runtime wrote after its optimisation are taken apart as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from toolkit.exporters.rewrites import remove_unused_initializers

MICROSOFT = "com.microsoft"
INTEGER_KERNEL = "integer_kernel"
"""Metadata of a quantiser that was part of an integer operator, whatever the runtime would have fused."""
ACTIVATIONS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "Relu": ("Relu", ()), "Sigmoid": ("Sigmoid", ()), "Tanh": ("Tanh", ()), "LeakyRelu": ("LeakyRelu", ("alpha",)),
    "HardSigmoid": ("HardSigmoid", ("alpha", "beta")),
}  # fmt: skip
"""Of fused operators: the operator, and the names of its parameters in order."""


class _NotRewritten(Exception):
    """This form of the operator has no QDQ form here; it stays as it is."""


def to_qdq(model: ModelProto) -> ModelProto:
    """A copy of `model` in which integer operators stand as float operators between quantisers; `model` if it has none.

    Operators without such a form (another memory layout, scales that are no constants) stay as they are.
    """
    if not any(node.op_type in RULES for node in model.graph.node):
        return model
    copied = ModelProto()
    copied.CopyFrom(model)
    rewriter = _Rewriter(copied)
    nodes: list[NodeProto] = []
    for node in copied.graph.node:
        rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx", MICROSOFT) else None
        try:
            nodes.extend([node] if rule is None else rule(rewriter, node))
        except _NotRewritten:
            nodes.append(node)
    del copied.graph.node[:]
    copied.graph.node.extend(nodes)
    copied.graph.initializer.extend(rewriter.added)
    remove_unused_initializers(copied.graph)
    return copied


class _Rewriter:
    """Makes nodes with names of their own, and new constants."""

    def __init__(self, model: ModelProto) -> None:
        self.constants = {item.name: item for item in model.graph.initializer}
        self.added: list[TensorProto] = []
        self._names = {name for node in model.graph.node for name in (*node.input, *node.output)}

    def name(self, stem: str) -> str:
        """A name that nothing has yet."""
        number = 0
        while (candidate := f"{stem}_{number}") in self._names:
            number += 1
        self._names.add(candidate)
        return candidate

    def constant(self, stem: str, values: Any) -> str:
        """A new constant with these values."""
        name = self.name(stem)
        self.added.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def values(self, name: str) -> Any:
        """Of a constant."""
        if name not in self.constants:
            raise _NotRewritten
        return numpy_helper.to_array(self.constants[name])

    def scale_size(self, name: str) -> int:
        """How many scales there are; 1 where it is computed."""
        return int(np.prod(self.constants[name].dims)) if name in self.constants else 1

    def dequantize(self, triple: tuple[str, str, str], axis: int = 1) -> tuple[NodeProto, str]:
        """The node that dequantises (integers, scale, zero point), and its output."""
        output = self.name(f"{triple[0]}_dequantised")
        inputs = [name for name in triple if name]
        extra: dict[str, Any] = {"axis": axis} if self.scale_size(triple[1]) > 1 else {}
        return helper.make_node("DequantizeLinear", inputs, [output], self.name("dequantize"), **extra), output

    def quantize(self, source: str, scale: str, zero_point: str, output: str) -> NodeProto:
        """The node that quantises `source` to `output`."""
        inputs = [name for name in (source, scale, zero_point) if name]
        node = helper.make_node("QuantizeLinear", inputs, [output], self.name("quantize"))
        node.metadata_props.add(key=INTEGER_KERNEL, value="1")
        return node

    def bias(self, name: str, first: str, second: str, factor: float = 1.0) -> tuple[list[NodeProto], list[str]]:
        """An int32 bias in units of the product of two scales, dequantised; nothing where there is no bias."""
        if not name:
            return [], []
        product = (self.values(first) * self.values(second) * np.float32(factor)).astype(np.float32)
        scale = self.constant(f"{name}_scale", product.reshape(()) if product.size == 1 else product.ravel())
        node = helper.make_node("DequantizeLinear", [name, scale], [self.name(f"{name}_dequantised")], axis=0)
        return [node], [str(node.output[0])]


def _inputs(node: NodeProto, count: int) -> list[str]:
    return [*node.input, *[""] * (count - len(node.input))]


def _attributes(node: NodeProto, *dropped: str) -> dict[str, Any]:
    found = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    if found.pop("channels_last", 0):
        raise _NotRewritten
    return {name: value for name, value in found.items() if name not in dropped}


def _convolution(make: _Rewriter, node: NodeProto) -> list[NodeProto]:
    x, xs, xz, w, ws, wz, ys, yz, b = _inputs(node, 9)
    attributes = _attributes(node)
    bias, names = make.bias(b, xs, ws)
    image, source = make.dequantize((x, xs, xz))
    kernel, weight = make.dequantize((w, ws, wz), axis=0)
    inner = make.name(f"{node.output[0]}_float")
    layer = helper.make_node("Conv", [source, weight, *names], [inner], node.name, **attributes)
    return [image, kernel, *bias, layer, make.quantize(inner, ys, yz, node.output[0])]


def _matmul(make: _Rewriter, node: NodeProto) -> list[NodeProto]:
    a, a_scale, a_zero, b, b_scale, b_zero, ys, yz = _inputs(node, 8)
    if make.scale_size(a_scale) > 1:
        raise _NotRewritten
    left, first = make.dequantize((a, a_scale, a_zero))
    right, second = make.dequantize((b, b_scale, b_zero), axis=-1)
    inner = make.name(f"{node.output[0]}_float")
    layer = helper.make_node("MatMul", [first, second], [inner], node.name)
    return [left, right, layer, make.quantize(inner, ys, yz, node.output[0])]


def _gemm(make: _Rewriter, node: NodeProto) -> list[NodeProto]:
    a, a_scale, a_zero, b, b_scale, b_zero, c, ys, yz = _inputs(node, 9)
    attributes = _attributes(node)
    bias, names = make.bias(c, a_scale, b_scale, attributes.get("alpha", 1.0))
    left, first = make.dequantize((a, a_scale, a_zero))
    right, second = make.dequantize((b, b_scale, b_zero), axis=0 if attributes.get("transB") else 1)
    inner = make.name(f"{node.output[0]}_float") if ys else node.output[0]
    layer = helper.make_node("Gemm", [first, second, *names], [inner], node.name, **attributes)
    end = [make.quantize(inner, ys, yz, node.output[0])] if ys else []
    return [left, right, *bias, layer, *end]


def _integer_layer(operator: str) -> Callable[[_Rewriter, NodeProto], list[NodeProto]]:
    """ConvInteger and MatMulInteger: the sums, as floating numbers; what follows casts them to float anyway."""

    def rule(make: _Rewriter, node: NodeProto) -> list[NodeProto]:
        a, b, a_zero, b_zero = _inputs(node, 4)
        one = make.constant("one", np.float32(1))
        if b_zero and make.scale_size(b_zero) > 1:
            raise _NotRewritten
        left, first = make.dequantize((a, one, a_zero))
        right, second = make.dequantize((b, one, b_zero))
        return [left, right, helper.make_node(operator, [first, second], node.output, node.name, **_attributes(node))]

    return rule


def _elementwise(operator: str) -> Callable[[_Rewriter, NodeProto], list[NodeProto]]:
    """Operators of two quantised tensors: (a, scale, zero point) twice, then scale and zero point of the result."""

    def rule(make: _Rewriter, node: NodeProto) -> list[NodeProto]:
        names = _inputs(node, 8)
        left, first = make.dequantize((names[0], names[1], names[2]))
        right, second = make.dequantize((names[3], names[4], names[5]))
        inner = make.name(f"{node.output[0]}_float")
        middle = helper.make_node(operator, [first, second], [inner], node.name)
        return [left, right, middle, make.quantize(inner, names[6], names[7], node.output[0])]

    return rule


def _single(operator: str, *dropped: str) -> Callable[[_Rewriter, NodeProto], list[NodeProto]]:
    """Operators of one quantised tensor: x, scale, zero point, then scale and zero point of the result."""

    def rule(make: _Rewriter, node: NodeProto) -> list[NodeProto]:
        x, xs, xz, ys, yz = _inputs(node, 5)
        attributes = _attributes(node, *dropped)
        start, source = make.dequantize((x, xs, xz))
        inner = make.name(f"{node.output[0]}_float")
        middle = helper.make_node(operator, [source], [inner], node.name, **attributes)
        return [start, middle, make.quantize(inner, ys, yz, node.output[0])]

    return rule


def _concat(make: _Rewriter, node: NodeProto) -> list[NodeProto]:
    scale, zero_point, *rest = node.input
    triples = zip(rest[::3], rest[1::3], rest[2::3], strict=True)
    parts = [make.dequantize((values, step, point)) for values, step, point in triples]
    inner = make.name(f"{node.output[0]}_float")
    middle = helper.make_node("Concat", [name for _, name in parts], [inner], node.name, **_attributes(node))
    return [*(part for part, _ in parts), middle, make.quantize(inner, scale, zero_point, node.output[0])]


def _where(make: _Rewriter, node: NodeProto) -> list[NodeProto]:
    condition, x, xs, xz, y, ys, yz, zs, zz = _inputs(node, 9)
    left, first = make.dequantize((x, xs, xz))
    right, second = make.dequantize((y, ys, yz))
    inner = make.name(f"{node.output[0]}_float")
    middle = helper.make_node("Where", [condition, first, second], [inner], node.name)
    return [left, right, middle, make.quantize(inner, zs, zz, node.output[0])]


def _dynamic_quantize(make: _Rewriter, node: NodeProto) -> list[NodeProto]:
    """The definition of DynamicQuantizeLinear: one scale for the whole batch, with 0 on the grid."""
    (x,) = node.input
    y, scale, zero_point = _outputs(make, node, 3)
    zero, levels = (make.constant(stem, np.float32(value)) for stem, value in (("zero", 0), ("levels", 255)))
    low, high, least, most, width, offset, negated, clipped, rounded = (
        make.name(f"{y}_{part}")
        for part in ("low", "high", "least", "most", "width", "offset", "negated", "clipped", "rounded")
    )
    return [
        helper.make_node("ReduceMin", [x], [low], keepdims=0),
        helper.make_node("ReduceMax", [x], [high], keepdims=0),
        helper.make_node("Min", [low, zero], [least]),
        helper.make_node("Max", [high, zero], [most]),
        helper.make_node("Sub", [most, least], [width]),
        helper.make_node("Div", [width, levels], [scale]),
        helper.make_node("Div", [least, scale], [offset]),
        helper.make_node("Neg", [offset], [negated]),
        helper.make_node("Clip", [negated, zero, levels], [clipped]),
        helper.make_node("Round", [clipped], [rounded]),
        helper.make_node("Cast", [rounded], [zero_point], to=TensorProto.UINT8),
        helper.make_node("QuantizeLinear", [x, scale, zero_point], [y], node.name),
    ]


def _outputs(make: _Rewriter, node: NodeProto, count: int) -> list[str]:
    names = [*node.output, *[""] * (count - len(node.output))]
    return [name or make.name(f"{node.output[0]}_extra") for name in names]


def _matmul_to_float(make: _Rewriter, node: NodeProto) -> list[NodeProto]:
    a, b, a_scale, b_scale, a_zero, b_zero, bias = _inputs(node, 7)
    left, first = make.dequantize((a, a_scale, a_zero))
    right, second = make.dequantize((b, b_scale, b_zero), axis=-1)
    inner = make.name(f"{node.output[0]}_float") if bias else node.output[0]
    layer = helper.make_node("MatMul", [first, second], [inner], node.name)
    end = [helper.make_node("Add", [inner, bias], node.output)] if bias else []
    return [left, right, layer, *end]


def _dynamic_matmul(make: _Rewriter, node: NodeProto) -> list[NodeProto]:
    a, b, b_scale, b_zero, bias = _inputs(node, 5)
    names = [make.name(f"{a}_{part}") for part in ("quantised", "scale", "zero_point")]
    quantiser = helper.make_node("DynamicQuantizeLinear", [a], names, make.name("quantize"))
    inputs = [names[0], b, names[1], b_scale, names[2], b_zero, bias]
    layer = helper.make_node("MatMulIntegerToFloat", inputs, node.output, node.name, domain=MICROSOFT)
    return [*_dynamic_quantize(make, quantiser), *_matmul_to_float(make, layer)]


def _activated(operator: str) -> Callable[[_Rewriter, NodeProto], list[NodeProto]]:
    """FusedConv and FusedGemm: the layer, what is added to it, and its activation."""

    def rule(make: _Rewriter, node: NodeProto) -> list[NodeProto]:
        attributes = _attributes(node)
        name = attributes.pop("activation", b"").decode()
        given = list(attributes.pop("activation_params", []))
        for letter in ("alpha", "beta", "gamma"):
            if f"activation_{letter}" in attributes:
                given.append(attributes.pop(f"activation_{letter}"))
        if name not in ACTIVATIONS:
            raise _NotRewritten
        kind, parameters = ACTIVATIONS[name]
        inner, added = make.name(f"{node.output[0]}_layer"), _inputs(node, 4)[3]
        layer = helper.make_node(operator, list(node.input)[:3], [inner], node.name, **attributes)
        summed = make.name(f"{node.output[0]}_sum") if added else inner
        between = [helper.make_node("Add", [inner, added], [summed])] if added else []
        end = helper.make_node(kind, [summed], node.output, **dict(zip(parameters, given, strict=False)))
        return [layer, *between, end]

    return rule


RULES: Mapping[str, Callable[[_Rewriter, NodeProto], list[NodeProto]]] = {
    "QLinearConv": _convolution, "QLinearMatMul": _matmul, "QGemm": _gemm, "ConvInteger": _integer_layer("Conv"),
    "MatMulInteger": _integer_layer("MatMul"), "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulIntegerToFloat": _matmul_to_float, "DynamicQuantizeMatMul": _dynamic_matmul,
    "QLinearAdd": _elementwise("Add"), "QLinearMul": _elementwise("Mul"), "QLinearConcat": _concat,
    "QLinearAveragePool": _single("AveragePool"), "QLinearGlobalAveragePool": _single("GlobalAveragePool"),
    "QLinearSigmoid": _single("Sigmoid"), "QLinearLeakyRelu": _single("LeakyRelu"),
    "QLinearSoftmax": _single("Softmax", "opset"), "QLinearReduceMean": _single("ReduceMean"),
    "QLinearWhere": _where, "FusedConv": _activated("Conv"), "FusedGemm": _activated("Gemm"),
}  # fmt: skip
"""By operator, of ONNX's own domain or of ONNX Runtime's."""
