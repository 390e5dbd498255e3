"""The precision that every layer of a QDQ graph stands in, and what in it is not as it should be."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from toolkit.errors import unknown_name
from toolkit.exporters.onnx import load_onnx, with_names

COMPUTE = ("Conv", "Gemm", "MatMul")
"""The layers: operators that multiply and accumulate."""


FUSED = ("Relu", "Clip")
"""Activations that are fused into the layer before them."""


@dataclass(frozen=True, slots=True)
class LayerPrecision:
    """One layer with weights (or a product of activations) and the precision it stands in."""

    name: str
    operator: str
    precision: Literal["int8", "int4", "float32"]
    """Of the weights; `int8`: with quantised activations, of 8 bits or 16. `int4`: the kernel rounds activations."""


def layer_precision(model: ModelProto) -> tuple[LayerPrecision, ...]:
    """Every Conv, Gemm and MatMul of a QDQ graph: int8 where both factors come out of a DequantizeLinear.

    int4 where the weights alone do, and are int4.
    """
    dequantised = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    four = {item.name for item in model.graph.initializer if item.data_type == TensorProto.INT4}

    def precision(node: NodeProto) -> Literal["int8", "int4", "float32"]:
        if dequantised.get(node.input[1]) in four:
            return "int4"
        return "int8" if set(node.input[:2]) <= set(dequantised) else "float32"

    return tuple(
        LayerPrecision(node.name, node.op_type, precision(node)) for node in model.graph.node if node.op_type in COMPUTE
    )


def float_weights(fp32: Path, deployed: Path) -> tuple[str, ...]:
    """Names, in the float twin, of the weights of layers that the deployed graph has in float."""
    kept = {layer.name for layer in layer_precision(load_onnx(deployed)) if layer.precision == "float32"}
    return tuple(
        node.input[1]
        for node in with_names(load_onnx(fp32)).graph.node
        if node.op_type in COMPUTE and node.name in kept
    )


def named_layers(model: ModelProto, patterns: Iterable[str], setting: str = "") -> tuple[str, ...]:
    """The layers of a graph that patterns name, in the order of the graph.

    Args:
        model: a float graph.
        patterns: names of nodes; `*` stands for anything.
        setting: where they stand, for the error.

    Raises:
        ToolkitError: a pattern that fits no layer.
    """
    layers = [node.name for node in model.graph.node if node.op_type in COMPUTE]
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = fnmatch.filter(layers, pattern)
        if not fitting:
            raise unknown_name(f"layer to leave float{setting and f' ({setting})'}", pattern, layers)
        chosen.update(fitting)
    return tuple(name for name in layers if name in chosen)


def between_float(model: ModelProto, kept: Collection[str], four_bit: Collection[str] = ()) -> tuple[str, ...]:
    """The nodes that are no layers and have no integer layer before them, or none behind them.

    The nearest layers count. With nothing but the image before it, a node follows those behind; with nothing but the
    logits behind it, those before. A Relu or Clip right behind an integer layer is none of them: it is fused into it,
    and what is rounded are the values behind, of half the range. Before layers of int4 weights it stays float: behind a
    dequantiser, ONNX Runtime would not multiply int4.

    Args:
        model: a float graph.
        kept: names of the layers that stay float.
        four_bit: of these, those that get int4 weights.
    """
    if not kept:
        return ()
    before, behind = _nearest(model.graph.node), _nearest(reversed(model.graph.node), backwards=True)
    integer = {node.output[0] for node in model.graph.node if node.op_type in COMPUTE and node.name not in kept}
    found = []
    for node in model.graph.node:
        fused = node.op_type in FUSED and node.input[0] in integer and not behind[node.output[0]] & set(four_bit)
        if node.op_type in COMPUTE or fused:
            continue
        sides = [nearest[node.output[0]] for nearest in (before, behind)]
        if any(side and side <= set(kept) for side in sides):
            found.append(node.name)
    return tuple(found)


def _nearest(nodes: Iterable[NodeProto], *, backwards: bool = False) -> dict[str, frozenset[str]]:
    """By a node's first output: the layers next to it on one side."""
    at: dict[str, frozenset[str]] = {}  # by tensor: what is met on the way to it
    found = {}
    for node in nodes:
        entries, exits = (node.output, node.input) if backwards else (node.input, node.output)
        met = frozenset[str]().union(*(at.get(name, frozenset()) for name in entries))
        found[node.output[0]] = met
        passed = frozenset({node.name}) if node.op_type in COMPUTE else met
        for name in exits:
            at[name] = at.get(name, frozenset()) | passed
    return found


def precision_faults(
    model: ModelProto,
    *,
    per_channel: bool = True,
    kept: Collection[str] = (),
    four_bit: Collection[str] = (),
    activations: Literal["uint8", "uint16"] = "uint8",
) -> tuple[str, ...]:
    """What in a QDQ graph is not int8 symmetric weights (per output channel) and unsigned activations; empty: nothing.

    Of the layers `kept` it is a fault to have integer weights, of those `four_bit` to have others than int4, symmetric
    and per output channel.
    """
    constants = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    faults = []
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and len(node.input) > 2 and constants[node.input[2]].dtype != activations:
            faults.append(f"{node.name}: activations are {constants[node.input[2]].dtype}, not {activations}")
        if node.op_type not in COMPUTE:
            continue
        source = producers.get(node.input[1])
        if node.name in kept:
            if source is not None and source.op_type == "DequantizeLinear" and source.input[0] in constants:
                faults.append(f"{node.name}: its weights are integers")
            continue
        if source is None or source.op_type != "DequantizeLinear":
            faults.append(f"{node.name}: its weights are float")
        elif source.input[0] in constants:
            wanted, granular = ("int4", True) if node.name in four_bit else ("int8", per_channel)
            faults.extend(f"{node.name}: {fault}" for fault in _weight_faults(source, constants, granular, wanted))
    return tuple(faults)


def _weight_faults(
    dequantise: NodeProto, constants: dict[str, Any], per_channel: bool, wanted: str = "int8"
) -> list[str]:
    weights, scale = constants[dequantise.input[0]], constants[dequantise.input[1]]
    zero_point = constants[dequantise.input[2]] if len(dequantise.input) > 2 else np.zeros(1, weights.dtype)
    axis = next((attribute.i for attribute in dequantise.attribute if attribute.name == "axis"), 1)
    faults = []
    if weights.dtype != wanted:
        faults.append(f"weights are {weights.dtype}, not {wanted}")
    if np.any(zero_point != 0):
        faults.append("weights are asymmetric")
    if per_channel and scale.size != weights.shape[axis]:
        faults.append(f"{scale.size} scale(s) for {weights.shape[axis]} channels")
    return faults
