"""Cross-layer equalisation: what lies between two layers is scaled so that one step of eight bits suits all channels.

Activations are rounded with one step for a whole tensor, as coarse as its widest channel asks for; in a narrow channel
little is left of eight bits. Behind a positively homogeneous operator (ReLU, pooling) a channel may be multiplied by
any positive factor if the next layer's weights for it are divided by the same: the float function stays what it was.
The layer before has a weight scale per output channel, so it loses nothing. After Nagel et al. 2019 (Data-free
quantization through weight equalization and bias correction), where ranges of weights set the factors; here those of
activations do, halfway, as in SmoothQuant (Xiao et al. 2023): fully equal activations would make the next layer's
weights too uneven.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from toolkit.exporters.rewrites import tensor_shapes

STRENGTH = 0.5
"""0: nothing is scaled; 1: all channels of a tensor get the same range."""
LARGEST = 16.0
"""Factor of a channel; those without any value are left alone."""
HOMOGENEOUS = frozenset((
    "AveragePool", "Flatten", "GlobalAveragePool", "GlobalMaxPool", "Identity", "LeakyRelu", "MaxPool", "Relu",
    "Reshape",
))  # fmt: skip
"""Operators f with f(a x) = a f(x) for a > 0 that keep channels apart; shapes are looked at besides."""

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layers between which channels may be scaled, by the tensors that they make: nodes need no names."""

    first: str
    second: str
    tensor: str
    """What the second one reads."""
    channels: int
    """Of the first; the tensor may hold each of them several times over, side by side (flattened)."""


def pairs(model: ModelProto) -> tuple[Pair, ...]:
    """The layers of a float graph between which channels may be scaled, in the order of the graph.

    Each tensor on the way has one reader, and both layers' weights are constants of their own.
    """
    graph, shapes = model.graph, tensor_shapes(model)
    uses = Counter(name for node in graph.node for name in node.input) + Counter(item.name for item in graph.output)
    readers = {name: node for node in graph.node for name in node.input}
    constants = {
        item.name: tuple(item.dims)
        for item in graph.initializer
        if uses[item.name] == 1 and item.data_type == TensorProto.FLOAT
    }
    found = []
    for node in graph.node:
        if not _may_be_first(node, constants):
            continue
        tensor, reader = node.output[0], readers.get(node.output[0])
        while uses[tensor] == 1 and reader is not None and _passes(reader, tensor, shapes):
            tensor, reader = reader.output[0], readers.get(reader.output[0])
        channels = _channels(node, constants)
        if uses[tensor] == 1 and reader is not None and _may_be_second(reader, tensor, constants, shapes, channels):
            found.append(Pair(node.output[0], reader.output[0], tensor, channels))
    return tuple(found)


def equalized(model: ModelProto, peaks: Mapping[Pair, Array], strength: float = STRENGTH) -> ModelProto:
    """A float graph of the same function, its channels between layers scaled.

    Args:
        model: a float graph; left as it is.
        peaks: the pairs whose channels are to be scaled, each with the largest absolute value of every channel (of the
            tensor's second axis), float64 [k * `channels`].
        strength: see `STRENGTH`.
    """
    made = ModelProto()
    made.CopyFrom(model)
    nodes = {node.output[0]: node for node in made.graph.node}
    weights = {item.name: item for item in made.graph.initializer}
    for pair, found in peaks.items():
        factors = _factors(found.reshape(pair.channels, -1).max(axis=1), strength)
        if (factors == 1).all():
            continue
        first, second = nodes[pair.first], nodes[pair.second]
        for name in first.input[1:]:
            values = numpy_helper.to_array(weights[name]).astype(np.float64)
            axis = values.ndim - 1 if name != first.input[1] else _outputs(first)
            _put(weights[name], values * _along(factors, axis, values.ndim))
        values = numpy_helper.to_array(weights[second.input[1]]).astype(np.float64)
        _put(weights[second.input[1]], values / _of_inputs(second, values, factors))
    return made


def _factors(peaks: Array, strength: float) -> Array:
    """At least 1, which the widest channel has."""
    present = peaks > 0
    if not present.any():
        return np.ones_like(peaks)
    ratio = peaks.max() / np.where(present, peaks, peaks.max())
    factors: Array = np.minimum(ratio**strength, LARGEST)
    return factors


def _put(item: TensorProto, values: Array) -> None:
    item.CopyFrom(numpy_helper.from_array(values.astype(np.float32), item.name))


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _outputs(layer: NodeProto) -> int:
    """The axis of a layer's weights that its output channels lie along."""
    return 0 if layer.op_type == "Conv" or _attribute(layer, "transB", 0) else 1


def _channels(layer: NodeProto, constants: Mapping[str, tuple[int, ...]]) -> int:
    return constants[layer.input[1]][_outputs(layer)]


def _along(factors: Array, axis: int, ndim: int) -> Array:
    return factors.reshape([-1 if at == axis else 1 for at in range(ndim)])


def _may_be_first(node: NodeProto, constants: Mapping[str, tuple[int, ...]]) -> bool:
    """Its output channels are rows or columns of constant weights, and its bias has a value for each."""
    if node.op_type not in ("Conv", "Gemm") or not set(node.input[1:]) <= set(constants):
        return False
    return all(constants[name] == (_channels(node, constants),) for name in node.input[2:])


def _passes(node: NodeProto, tensor: str, shapes: Mapping[str, tuple[int | str, ...]]) -> bool:
    """Whether channels that are scaled in front of a node are scaled behind it."""
    if node.op_type not in HOMOGENEOUS or node.input[0] != tensor:
        return False
    if node.op_type not in ("Flatten", "Reshape"):
        return True
    before, after = shapes.get(tensor, ()), shapes.get(node.output[0], ())
    sizes = [size for size in before[1:] if isinstance(size, int)]
    return len(after) == 2 and len(sizes) == len(before) - 1 > 0 and after[1] == int(np.prod(sizes))


def _may_be_second(
    node: NodeProto,
    tensor: str,
    constants: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int | str, ...]],
    channels: int,
) -> bool:
    """It multiplies every channel by constant weights of that channel's own."""
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[0] != tensor or node.input[1] not in constants:
        return False
    shape = constants[node.input[1]]
    if node.op_type == "Conv":
        return shape[1] * _attribute(node, "group", 1) == channels
    flat = len(shape) == 2 and len(shapes.get(tensor, ())) == 2 and not _attribute(node, "transA", 0)
    return flat and shape[1 - _outputs(node)] % channels == 0


def _of_inputs(layer: NodeProto, weights: Array, factors: Array) -> Array:
    """The factor of the input channel that each weight belongs to; broadcasts to the weights."""
    if layer.op_type != "Conv":
        inputs = 1 - _outputs(layer)
        return _along(np.repeat(factors, weights.shape[inputs] // len(factors)), inputs, weights.ndim)
    groups = _attribute(layer, "group", 1)
    of_group = factors.reshape(groups, 1, -1)
    per_output = np.broadcast_to(of_group, (groups, len(weights) // groups, of_group.shape[2]))
    return per_output.reshape(len(weights), -1, *(1,) * (weights.ndim - 2))
