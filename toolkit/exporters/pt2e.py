"""From a network quantised by PyTorch's own flow (PT2E of torchao) to the same integer graph that other engines write.

A converted PT2E model holds quantisers, and weights of 8 bits, in a graph of torch operators. It is exported as it
stands and walked side by side with the float twin, which tells every quantiser's tensor and every weight's layer apart
by the twin's names. The graph that ships is then written over the twin with that arithmetic, so that everything that
holds for other integer graphs holds for it: names, input quantiser, float logits, layers left float.
"""

from __future__ import annotations

import copy
import importlib.util
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, NodeProto, numpy_helper
from torch.fx import Graph, GraphModule, Node

from toolkit.config import QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.input_range import pixel_map
from toolkit.exporters.integers import RoundedWeights, build_integers, preprocess, quantised_tensors
from toolkit.exporters.onnx import OUTPUT, convert_module
from toolkit.exporters.precision import COMPUTE
from toolkit.exporters.ranges import LEVELS, Interval
from toolkit.exporters.variants import DEPLOYED, Variant

QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
PASSING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
"""Operators whose results are values of their input."""
CLIPPING = ("Relu", "Clip")
MISFIT = 0.2
"""How far rounded weights may be from the twin's, as a share of their norm; 8 bits come to less than 0.02."""
OBSERVED = (
    "conv1d", "conv2d", "linear", "matmul", "add", "add_", "mul", "mul_", "relu", "relu_", "hardtanh", "hardtanh_",
    "relu6", "clamp", "clamp_", "leaky_relu", "leaky_relu_", "sigmoid", "avg_pool2d", "adaptive_avg_pool2d", "mean",
    "cat", "pad",
)  # fmt: skip
"""Operators of torch that have integer kernels in ONNX Runtime, which need a quantiser behind them."""
ABSORBED = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "clamp", "clamp_")
"""Operators that the quantiser behind them does as well: what they alone read needs none."""


@dataclass(frozen=True)
class Arithmetic:
    """What a PT2E model computes with, by the names of its float twin."""

    ranges: Mapping[str, Interval]
    """By tensor: what its uint8 quantiser represents."""
    weights: Mapping[str, RoundedWeights]
    """By layer."""


def require(package: str) -> None:
    """See that an optional package is there before work begins.

    Raises:
        ToolkitError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ToolkitError(
            "a package that this way of quantising needs is not installed",
            found=f"no package {package}",
            fix="pip install 'onnx-hardening-toolkit[inc]' (with -c constraints.txt in the source folder), or quantise "
            "with --engine ort",
        )


def complete(prepared: GraphModule) -> None:
    """Give a prepared PT2E model the observers that ONNX Runtime's kernels need, in place, before it sees images.

    Quantisers for PyTorch's own kernels look at what layers read. An integer kernel of ONNX Runtime writes 8 bits too,
    so that for instance both summands of a residual connection need a quantiser. Those added are copies of the
    first one there is for activations. In a model for training they round like all others.
    """
    inner = dict(prepared.named_modules())
    watchers = {node for node in prepared.graph.nodes if _is_watcher(node, inner)}
    template = next((inner[str(node.target)] for node in watchers if _watches_activation(node)), None)
    if template is None:
        return
    missing = [node for node in _unwatched(prepared.graph) if watchers.isdisjoint(node.users)]
    for number, node in enumerate(missing):
        name = f"activation_post_process_of_{node.name}_{number}"
        prepared.add_submodule(name, copy.deepcopy(template))
        with prepared.graph.inserting_after(node):
            added = prepared.graph.call_module(name, (node,))
        node.replace_all_uses_with(added)
        added.args = (node,)
    prepared.recompile()


def convert(prepared: GraphModule) -> GraphModule:
    """The converted form of a calibrated or trained model, weights in 8 bits; `prepared` is used up."""
    require("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    converted: GraphModule = convert_pt2e(prepared, fold_quantize=True)
    return converted


def read_arithmetic(converted: GraphModule, twin: ModelProto, shape: tuple[int, int, int]) -> Arithmetic:
    """Find out what a converted model computes with.

    Args:
        converted: from pixels to logits, as `convert` gives it.
        twin: the float twin of the same network with the same weights, as `export_onnx` writes it.
        shape: channels, height and width of the images.

    Raises:
        ToolkitError: the two are not the same network, or the exporter cannot handle the converted one.
    """
    opset = next(entry.version for entry in twin.opset_import if entry.domain in ("", "ai.onnx"))
    return match(convert_module(converted, shape, opset), twin)


def match(integer: ModelProto, twin: ModelProto) -> Arithmetic:
    """The arithmetic of a converted model that stands in ONNX form.

    Raises:
        ToolkitError: it is not the network of the float twin.
    """
    return _Walk(integer, twin).arithmetic()


def write_arithmetic(
    arithmetic: Arithmetic,
    twin: ModelProto,
    config: QuantizeConfig,
    *,
    kept: Collection[str] = (),
    margin: float = 0.0,
    variant: Variant = DEPLOYED,
) -> tuple[ModelProto, tuple[str, ...]]:
    """The finished integer graph, QDQ form, of a float twin with a PT2E model's arithmetic.

    The input quantiser is our own: it represents all pixels in [-margin, 1 + margin], with the normalisation inside
    where that is possible. Biases are int32. Where a normalisation with several channels is folded, the first layer's
    weights are rounded anew.

    Args:
        arithmetic: from `read_arithmetic`.
        twin: the float twin; names, metadata and float weights come from it.
        config: the granularity of weight scales.
        kept: the layers that stay float.
        margin: pixels by which images may leave [0, 1].
        variant: what differs from the graph that ships.

    Returns:
        the graph, and all layers that are float in it: `kept`, and those that the PT2E model has in float.
    """
    plain = preprocess(twin)
    ranges = _spread(plain, arithmetic.ranges)
    kept = tuple(dict.fromkeys((*kept, *_unquantised(plain, ranges, arithmetic.weights))))
    graph = build_integers(
        plain, twin, ranges, config, kept=kept, margin=margin, weights=arithmetic.weights, variant=variant
    )
    return graph, kept


def _is_watcher(node: Node, inner: Mapping[str, torch.nn.Module]) -> bool:
    from torchao.quantization.pt2e import FakeQuantizeBase, ObserverBase

    return node.op == "call_module" and isinstance(inner.get(str(node.target)), ObserverBase | FakeQuantizeBase)


def _watches_activation(watcher: Node) -> bool:
    return isinstance(watcher.args[0], Node) and watcher.args[0].op == "call_function"


def _operator(node: Node) -> str:
    """The name of an aten operator, or nothing."""
    packet = getattr(node.target, "overloadpacket", None)
    return "" if node.op != "call_function" or packet is None else str(packet).rsplit(".", 1)[-1]


def _unwatched(graph: Graph) -> list[Node]:
    """The nodes whose results need a quantiser for integer kernels behind or before them."""
    depending: set[Node] = set()
    found = []
    for node in graph.nodes:
        if node.op != "placeholder" and depending.isdisjoint(node.all_input_nodes):
            continue
        depending.add(node)
        value = node.meta.get("val")
        wanted = _operator(node) in OBSERVED
        absorbed = len(node.users) == 1 and _operator(next(iter(node.users))) in ABSORBED
        if wanted and not absorbed and isinstance(value, torch.Tensor) and value.is_floating_point():
            found.append(node)
    return found


class _Walk:
    """Two graphs of one network, the first with quantisers between its nodes, node by node."""

    def __init__(self, integer: ModelProto, twin: ModelProto) -> None:
        self._constants, self._twin_constants = _constants(integer), _constants(twin)
        self._values = {item.name: numpy_helper.to_array(item) for item in integer.graph.initializer}
        self._twin_values = {item.name: numpy_helper.to_array(item) for item in twin.graph.initializer}
        self._producers = {name: node for node in integer.graph.node for name in node.output}
        self._quantisers = {
            node.input[0]: node for node in reversed(integer.graph.node) if node.op_type == QUANTISERS[0]
        }
        self._names = {integer.graph.input[0].name: twin.graph.input[0].name}  # of the twin, by ours
        ours = [node for node in _skeleton(integer, self._constants) if node.op_type not in QUANTISERS]
        theirs = list(_skeleton(twin, self._twin_constants))
        self._pairs = list(zip(ours, theirs, strict=False))
        for one, other in self._pairs:
            self._pair(one, other)
        if len(ours) != len(theirs):
            raise _other_network(f"{len(ours)} operators beside {len(theirs)} of the float twin")

    def _pair(self, one: NodeProto, other: NodeProto) -> None:
        read = [self._names.get(self._source(name)) for name in one.input if name not in self._constants]
        wanted = [name for name in other.input if name not in self._twin_constants]
        if one.op_type != other.op_type or read != wanted:
            raise _other_network(f"{one.op_type} '{one.name}' beside {other.op_type} '{other.name}' of the float twin")
        self._names.update(zip(one.output, other.output, strict=True))

    def _source(self, name: str) -> str:
        """The tensor in front of the quantisers."""
        while name in self._producers and self._producers[name].op_type in QUANTISERS:
            name = self._producers[name].input[0]
        return name

    def arithmetic(self) -> Arithmetic:
        ranges = {
            self._names[name]: self._range(node) for name, node in self._quantisers.items() if name in self._names
        }
        weights = {}
        for one, other in self._pairs:
            rounded = self._weights(one) if one.op_type in COMPUTE else None
            if rounded is not None:
                self._check(rounded, one, other)
                weights[other.name] = rounded
        return Arithmetic(ranges, weights)

    def _range(self, quantiser: NodeProto) -> Interval:
        scale, zero_point = (self._values[name] for name in quantiser.input[1:3])
        if zero_point.dtype != np.uint8 or scale.size != 1:
            raise _other_network(f"activations of {zero_point.dtype}, {scale.size} scale(s), at '{quantiser.input[0]}'")
        step, zero = float(scale.ravel()[0]), int(zero_point.ravel()[0])
        return -zero * step, (LEVELS - zero) * step

    def _weights(self, layer: NodeProto) -> RoundedWeights | None:
        """None: they are float."""
        producer = self._producers.get(layer.input[1])
        while producer is not None and producer.op_type == "Transpose":
            producer = self._producers.get(producer.input[0])
        if producer is None or producer.op_type != QUANTISERS[1] or producer.input[0] not in self._values:
            return None
        integers, scales = (self._values[name] for name in producer.input[:2])
        return RoundedWeights(integers, scales.ravel().astype(np.float32))

    def _check(self, rounded: RoundedWeights, one: NodeProto, other: NodeProto) -> None:
        """The weights of both must be the same, up to rounding."""
        theirs = self._twin_values.get(other.input[1])
        if theirs is None:
            return
        ours = rounded.integers * rounded.scales.reshape(-1, *[1] * (rounded.integers.ndim - 1))
        if ours.shape != theirs.shape and ours.T.shape == theirs.shape:
            ours = ours.T
        if ours.shape != theirs.shape or np.linalg.norm(ours - theirs) > MISFIT * np.linalg.norm(theirs):
            raise _other_network(f"the weights of '{one.name}' are not those of '{other.name}' of the float twin")


def _constants(model: ModelProto) -> set[str]:
    """Names of tensors that do not depend on the image."""
    found = {item.name for item in model.graph.initializer} | {""}
    for node in model.graph.node:
        if found.issuperset(node.input):
            found.update(node.output)
    return found


def _skeleton(model: ModelProto, constants: Collection[str]) -> Iterator[NodeProto]:
    return (node for node in model.graph.node if node.output[0] not in constants)


def _other_network(found: str) -> ToolkitError:
    return ToolkitError(
        "the quantised network is not the float twin's",
        found=found,
        fix="quantise with --engine ort, which works on the float twin itself",
    )


def _spread(plain: ModelProto, known: Mapping[str, Interval]) -> dict[str, Interval]:
    """Ranges, with those of tensors that need none of their own: on either side of operators that pass values on.

    What a Relu or Clip alone reads is never quantised, nor are the logits of a last layer; their ranges only have to be
    there.
    """
    ranges = dict(known)
    readers = Counter(name for node in plain.graph.node for name in node.input)
    for node in plain.graph.node:
        source, target = node.input[0] if node.input else "", node.output[0]
        if node.op_type in PASSING and source in ranges:
            ranges.setdefault(target, ranges[source])
    for node in reversed(plain.graph.node):
        source, target = node.input[0] if node.input else "", node.output[0]
        if target in ranges and (node.op_type in PASSING or (node.op_type in CLIPPING and readers[source] == 1)):
            ranges.setdefault(source, ranges[target])
    makers = {node.output[0]: node for node in plain.graph.node}
    if OUTPUT in makers and makers[OUTPUT].op_type in ("Gemm", "MatMul"):
        ranges.setdefault(OUTPUT, (0.0, 1.0))
    return ranges


def _unquantised(
    plain: ModelProto, ranges: Mapping[str, Interval], weights: Mapping[str, RoundedWeights]
) -> Iterator[str]:
    """Layers whose weights are float, or that read or make what has no range."""
    tensors = set(quantised_tensors(plain)).difference(ranges, _first_read(plain))
    constants: dict[str, Any] = {item.name: item for item in plain.graph.initializer}
    for node in plain.graph.node:
        if node.op_type in COMPUTE:
            unscaled = node.input[1] in constants and node.name not in weights
            if unscaled or tensors.intersection((*node.input[:2], node.output[0])):
                yield node.name


def _first_read(plain: ModelProto) -> set[str]:
    """The tensor behind the normalisation, which has a quantiser of its own."""
    return {pixel_map(plain).tensor}
