"""Which layers of an integer graph run in kernels whose sums saturate, and on which machines."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto

from toolkit.evaluators.environment import cpu_features
from toolkit.exporters.precision import COMPUTE

VNNI = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Instruction sets that sum four products in 32 bits."""
SIGNED_SHIFT = 128
MOVES = ("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Identity", "Slice", "Gather")
"""Operators that hand on the integers of their first input."""


@dataclass(frozen=True, slots=True)
class Saturating:
    """A layer that a saturating kernel runs."""

    layer: str
    shift: int
    """Added to the activations before they are multiplied: kernels take signed ones for unsigned ones plus 128."""


@dataclass(frozen=True, slots=True)
class Spared:
    """A layer that no saturating kernel runs, or that is not emulated, and why."""

    layer: str
    reason: str


def saturates_here() -> bool:
    """Whether this machine is one of those that saturate; False where its system does not tell its features."""
    found = set(cpu_features())
    return "avx2" in found and found.isdisjoint(VNNI)


def saturating_layers(
    model: ModelProto, integer: Collection[str]
) -> tuple[Mapping[str, Saturating], tuple[Spared, ...]]:
    """Which layers a saturating kernel would run, by their first output; and the others with the reason.

    Args:
        model: a graph in QDQ form.
        integer: names of the layers that run in integers; layers without a name are taken to.
    """
    graph = _Types(model)
    found: dict[str, Saturating] = {}
    spared = []
    for node in model.graph.node:
        if node.op_type in COMPUTE:
            name = node.name or node.output[0]
            reason = "a float kernel" if node.name and node.name not in integer else graph.exemption(node)
            if reason is None:
                found[node.output[0]] = Saturating(name, SIGNED_SHIFT if graph.signed(node) else 0)
            else:
                spared.append(Spared(name, reason))
    return found, tuple(spared)


class _Types:
    """The integer types that lie behind the factors of layers."""

    def __init__(self, model: ModelProto) -> None:
        self._constants = {item.name: item for item in model.graph.initializer}
        self._makers = {name: node for node in model.graph.node for name in node.output}

    def exemption(self, node: NodeProto) -> str | None:
        """Why a layer that runs in integers cannot saturate; None: it can."""
        weights = self._source(node.input[1])
        shape = self._constants[weights].dims if weights in self._constants else None
        kinds = [self._type(node.input[0]), self._type(node.input[1])]
        if None in kinds:
            return "a float kernel"
        if shape is None and kinds[1] == TensorProto.UINT8:
            return "a product of two activations: its kernel widens them first"
        if shape is None:
            return "not emulated: a product of two activations, of which the second is signed, saturates"
        group = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        if node.op_type == "Conv" and shape[1] == 1 and shape[0] == group:
            return "depthwise: its kernel widens to 16 bits first"
        if kinds[1] != TensorProto.INT8:
            return "unsigned weights: their kernel widens them first"
        return None

    def signed(self, node: NodeProto) -> bool:
        """Whether a layer's activations are."""
        return self._type(node.input[0]) == TensorProto.INT8

    def _source(self, name: str) -> str:
        """The integers that `name` is the dequantised form of; itself where it is none."""
        maker = self._makers.get(name)
        while maker is not None and maker.op_type in MOVES:
            maker = self._makers.get(maker.input[0])
        return maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else name

    def _type(self, name: str) -> int | None:
        """Of those integers; None: there are none."""
        source = self._source(name)
        if source == name:
            return None
        if source in self._constants:
            return int(self._constants[source].data_type)
        maker = self._makers.get(source)
        while maker is not None and maker.op_type in MOVES:
            maker = self._makers.get(maker.input[0])
        if maker is None or maker.op_type != "QuantizeLinear":
            return None
        point = self._constants.get(maker.input[2]) if len(maker.input) > 2 else None
        named = next((attribute.i for attribute in maker.attribute if attribute.name == "output_dtype"), 0)
        return int(point.data_type if point is not None else named or TensorProto.UINT8)
