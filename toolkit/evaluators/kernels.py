"""ONNX Runtime's kernels of a graph, from a profile: what runs, on which shapes, and for how long."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, helper

from toolkit.exporters.onnx import with_names
from toolkit.exporters.session import Provider, make_session

CONVOLUTIONS = {"Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvInteger": 1, "QLinearConv": 3}
"""Operators and the index of their weights."""
TRANSPOSED = {"ConvTranspose": 1}
PRODUCTS = {
    "Gemm": 1, "FusedGemm": 1, "MatMul": 1, "FusedMatMul": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1, "QLinearMatMul": 3, "QGemm": 3, "MatMulNBits": 1,
}  # fmt: skip
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""Recurrent layers, and how many matrices each holds for what it reads and as many for its state."""
INTEGER_KERNELS = frozenset(
    {"QLinearConv", "ConvInteger", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat",
     "DynamicQuantizeMatMul"}
)  # fmt: skip
ROUNDS_INPUT = 4
"""`accuracy_level` of a MatMulNBits that rounds what it reads to int8 and multiplies integers; below, it multiplies
floats by unpacked weights."""
BYTES = {"uint8", "int8"}
FLOATS = {"float", "float16", "double", "bfloat16"}
ARRAYS: Mapping[str, tuple[type[np.generic], int]] = {
    "tensor(float)": (np.float32, 1),
    "tensor(float16)": (np.float16, 1),
    "tensor(double)": (np.float64, 1),
    "tensor(uint8)": (np.uint8, 255),
}
"""By ONNX Runtime's word for an input's type: what is fed, and its white."""
PADDING = 16
"""nchwc kernels round channels up to a block of 8 or 16."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What a layer computes, in terms that optimisation keeps; `channels` may grow by padding."""

    family: str
    kernel: Shape
    """Height and width of the filter; for a product, its inner length."""
    positions: Shape
    """Height and width of the output; for a product, its rows."""
    channels: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """One node as it ran, for one image."""

    name: str
    operator: str
    domain: str
    aliases: frozenset[str]
    work: Work | None
    macs: int
    microseconds: float
    integer: bool
    float_data: bool


def measure(
    model: ModelProto,
    folder: Path,
    *,
    optimized: bool,
    provider: Provider,
    threads: int | None,
    runs: int,
    image: tuple[int, ...] | None = None,
) -> list[Kernel]:
    """Run a graph on one image under the profiler.

    Args:
        model: the graph; left as it is.
        folder: a temporary folder of the caller's.
        optimized: as deployed, or as it stands.
        provider: where.
        threads: CPU threads.
        runs: timed runs; the median over them counts, after as many to warm up.
        image: sizes of one image, in the order of the graph's axes, for files that take any; None: 1 where it is free.

    Returns:
        the kernels in the order of the graph that ran.
    """
    stem = "optimized" if optimized else "written"
    source, result = folder / f"{stem}-in.onnx", folder / f"{stem}-out.onnx"
    source.write_bytes(with_names(model).SerializeToString())
    session = make_session(
        source,
        provider=provider,
        threads=threads,
        optimized=optimized,
        profile_prefix=folder / stem,
        optimized_path=result,
    )
    feeds = {node.name: _example(node.shape, node.type, image) for node in session.get_inputs()}
    for _ in range(2 * runs):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    ran = onnx.load(result)
    return _kernels(ran, [event for event in events if event.get("cat") == "Node"], runs)


def _example(shape: list[int | str | None], kind: str, image: tuple[int, ...] | None) -> npt.NDArray[Any]:
    """One image, from black to white, of the graph's type."""
    free = (1, *(image if image is not None and len(image) + 1 == len(shape) else (1,) * (len(shape) - 1)))
    sizes = [size if isinstance(size, int) else other for size, other in zip(shape, free, strict=True)]
    dtype, white = ARRAYS.get(kind, (np.float32, 1))
    return np.linspace(0, white, math.prod(sizes)).astype(dtype).reshape(sizes)


def _kernels(model: ModelProto, events: Iterable[Mapping[str, Any]], runs: int) -> list[Kernel]:
    # Nodes that optimisation adds may share a name; the order in which they first ran tells them apart.
    ran: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        name = str(event["name"])
        if name.endswith("_kernel_time"):
            ran[name.removesuffix("_kernel_time")][event["args"]["node_index"]].append(event)
    queues = {name: iter(nodes.values()) for name, nodes in ran.items()}
    weights = _weight_shapes(model)
    aliases = _aliases(model)
    found = []
    for node in model.graph.node:
        key = node.name or node.op_type
        runs_of_node = next(queues.get(key, iter(())), None)
        if runs_of_node is None:  # a constant, folded before the run
            continue
        arguments = runs_of_node[-1]["args"]
        read = [_typed(entry) for entry in arguments["input_type_shape"]]
        written = [_typed(entry) for entry in arguments["output_type_shape"]]
        work, count = _work(node, read, written, weights)
        integer = node.op_type.startswith("QLinear") or multiplies_integers(node)
        kinds = {read[0][0] if read else "", written[0][0] if written else ""}
        found.append(
            Kernel(
                key,
                node.op_type,
                node.domain,
                aliases[node.output[0]],
                work,
                count,
                statistics.median(float(event["dur"]) for event in runs_of_node[-runs:]),
                integer or kinds <= BYTES,
                not integer and bool(kinds & FLOATS),
            )
        )
    return found


def multiplies_integers(node: NodeProto) -> bool:
    """Whether the kernel of a layer multiplies and accumulates integers."""
    if node.op_type == "MatMulNBits":
        return any(entry.name == "accuracy_level" and entry.i == ROUNDS_INPUT for entry in node.attribute)
    return node.op_type in INTEGER_KERNELS


def _typed(entry: Mapping[str, list[int]]) -> tuple[str, Shape]:
    ((kind, shape),) = entry.items()
    return kind, tuple(shape)


def _weight_shapes(model: ModelProto) -> dict[str, Shape]:
    """Shapes of constants, under their own names and behind a DequantizeLinear."""
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in shapes:
            shapes[node.output[0]] = shapes[node.input[0]]
    return shapes


def _aliases(model: ModelProto) -> dict[str, frozenset[str]]:
    """For each node (by its first output): the names under which optimisation may know it.

    They are its own name and output and those of the nodes behind it, as far as each is the only consumer: a fused
    activation or addition lends its name to the whole.
    """
    consumers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in filter(None, node.input):
            consumers[name].append(node)
    layers = {*CONVOLUTIONS, *TRANSPOSED, *PRODUCTS, *GATES, "Einsum"}
    found = {}
    for node in model.graph.node:
        names = {_stem(node.name), node.output[0]}
        last = node
        while len(following := consumers.get(last.output[0], [])) == 1 and following[0].op_type not in layers:
            last = following[0]
            names |= {_stem(last.name), last.output[0]}
        found[node.output[0]] = frozenset(names)
    return found


def _stem(name: str) -> str:
    """The name before ONNX Runtime's fusions added to it."""
    return re.sub(r"(_token_\d+|_nchwc|_nhwc|_quant)+$", "", name.removeprefix("fused "))


def _work(
    node: NodeProto, read: list[tuple[str, Shape]], written: list[tuple[str, Shape]], weights: Mapping[str, Shape]
) -> tuple[Work | None, int]:
    """The layer's work and its multiply-accumulates; (None, 0) for a node that is no layer."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type in CONVOLUTIONS or node.op_type in TRANSPOSED:
        index = (CONVOLUTIONS | TRANSPOSED)[node.op_type]
        weight = weights.get(node.input[index]) or read[index][1]
        out = written[0][1]
        last = bool(attributes.get("channels_last", 0)) or node.op_type.startswith("Nhwc")
        channels, positions = (out[-1], out[1:-1]) if last else (out[1], out[2:])
        elements = math.prod(read[0][1]) if node.op_type in TRANSPOSED else math.prod(out)
        return Work("convolution", weight[2:], positions, channels), elements * math.prod(weight[1:])
    if node.op_type in PRODUCTS:
        left, out = read[0][1], written[0][1]
        inner = left[0] if attributes.get("transA", 0) and len(left) == 2 else left[-1]
        return Work("product", (inner,), out[:-1], out[-1]), math.prod(out) * inner
    if node.op_type == "Einsum" and len(read) > 1:
        out, equation = written[0][1] or (1,), attributes["equation"].decode()
        inner = _summed(equation, [shape for _, shape in read])
        return Work("einsum", (inner,), out[:-1], out[-1]), math.prod(out) * inner * (len(read) - 1)
    if node.op_type in GATES:
        (steps, images, features), state = read[0][1], attributes["hidden_size"]
        directions = 1 + (attributes.get("direction") == b"bidirectional")
        count = steps * images * directions * GATES[node.op_type] * state * (features + state)
        return Work(node.op_type, (features + state,), (steps, images), directions * state), count
    return None, 0


def _summed(equation: str, shapes: list[Shape]) -> int:
    """Terms that an Einsum adds up for each number that it gives: the product of the sizes that the result lacks."""
    terms, arrow, result = equation.replace(" ", "").partition("->")
    sizes = dict[str, int]()
    for term, shape in zip(terms.split(","), shapes, strict=True):
        before, dots, after = term.partition("...")
        first = len(shape) - len(after) if dots else len(before)
        for label, size in [*zip(before, shape, strict=False), *zip(after, shape[first:], strict=True)]:
            sizes[label] = max(size, sizes.get(label, 1))
    kept = set(result) if arrow else {label for label in sizes if terms.count(label) == 1}
    return math.prod(size for label, size in sizes.items() if label not in kept)


def match(layers: list[Kernel], kernels: list[Kernel]) -> dict[str, Kernel]:
    """Which kernel of the optimised graph runs which layer of the graph in the file, by the layers' names.

    Names decide where they survive optimisation; the rest is matched by shape, in order. Layers that share a shape cost
    the same, so that the totals are exact whichever of them is taken for which.
    """
    found: dict[str, Kernel] = {}
    free = list(kernels)
    for by_name in (True, False):
        for layer in layers:
            if layer.name in found:
                continue
            fitting = [kernel for kernel in free if _same_work(layer.work, kernel.work)]
            if by_name:
                fitting = [
                    kernel
                    for kernel in fitting
                    if kernel.aliases & layer.aliases or _stem(kernel.name) in layer.aliases
                ]
            if len(fitting) == 1 or (fitting and not by_name):
                found[layer.name] = fitting[0]
                free.remove(fitting[0])
    return found


def _same_work(layer: Work | None, kernel: Work | None) -> bool:
    if layer is None or kernel is None:
        return False
    padding = kernel.channels - layer.channels
    same_channels = padding == 0 or (0 < padding < PADDING and kernel.channels % 8 == 0)
    return (layer.family, layer.kernel, layer.positions) == (
        kernel.family,
        kernel.kernel,
        kernel.positions,
    ) and same_channels
