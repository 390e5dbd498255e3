"""Exact rewrites of ONNX graphs: operators that have integer kernels for those that have none; stripped metadata."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

SPATIAL = ({2, 3}, {-2, -1}, {2, -1}, {-2, 3})
"""The axes of height and width, in all spellings."""


def rewrite(model: ModelProto) -> ModelProto:
    """A copy of `model` with the same function in which float islands stand as operators with integer kernels."""
    copied = ModelProto()
    copied.CopyFrom(model)
    ranks = tensor_ranks(copied)
    for index in range(len(copied.graph.node) - 1, -1, -1):
        node = copied.graph.node[index]
        if node.op_type == "ReduceMean" and ranks.get(node.input[0]) == 4 and _axes(copied.graph, node) in SPATIAL:
            replacement = _global_pool(node)
            del copied.graph.node[index]
            for offset, new in enumerate(replacement):
                copied.graph.node.insert(index + offset, new)
        elif node.op_type == "Gemm":
            _fold_factors(copied.graph, node)
    remove_unused_initializers(copied.graph)
    return copied


def _global_pool(node: NodeProto) -> list[NodeProto]:
    """GlobalAveragePool is the mean over height and width; without keepdims, Flatten drops the two axes of size 1."""
    keepdims = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
    source, target = node.input[0], node.output[0]
    if keepdims:
        return [helper.make_node("GlobalAveragePool", [source], [target], name=node.name)]
    pooled = f"{target}_pooled"
    return [
        helper.make_node("GlobalAveragePool", [source], [pooled], name=node.name),
        helper.make_node("Flatten", [pooled], [target], name=f"{node.name}_flatten", axis=1),
    ]


def _fold_factors(graph: GraphProto, node: NodeProto) -> None:
    """Multiply constants of a Gemm by its alpha and beta, which integer kernels do not have, or lose."""
    constants = {item.name: item for item in graph.initializer}
    for factor, place in (("alpha", 1), ("beta", 2)):
        attribute = next((one for one in node.attribute if one.name == factor), None)
        if attribute is None or attribute.f == 1 or len(node.input) <= place or node.input[place] not in constants:
            continue
        scaled = (attribute.f * numpy_helper.to_array(constants[node.input[place]])).astype(np.float32)
        node.input[place] = f"{node.output[0]}_{factor}_folded"
        graph.initializer.append(numpy_helper.from_array(scaled, node.input[place]))
        attribute.f = 1.0


def _axes(graph: GraphProto, node: NodeProto) -> set[int] | None:
    for attribute in node.attribute:
        if attribute.name == "axes":
            return set(attribute.ints)
    if len(node.input) < 2:
        return None
    for initializer in graph.initializer:
        if initializer.name == node.input[1]:
            return {int(axis) for axis in np.ravel(numpy_helper.to_array(initializer))}
    return None


def tensor_shapes(model: ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Sizes of every tensor whose shape can be inferred; those that are not known by their names, or empty."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {
        value.name: tuple(
            axis.dim_value if axis.HasField("dim_value") else axis.dim_param
            for axis in value.type.tensor_type.shape.dim
        )
        for value in values
        if value.type.tensor_type.HasField("shape")
    }


def tensor_ranks(model: ModelProto) -> dict[str, int]:
    """Number of axes of every tensor whose shape can be inferred."""
    return {name: len(shape) for name, shape in tensor_shapes(model).items()}


def remove_unused_initializers(graph: GraphProto) -> None:
    """Drop the constants that no node reads, in place."""
    used = {name for inner in graphs(graph) for node in inner.node for name in node.input}
    used |= {output.name for output in graph.output}
    kept = [initializer for initializer in graph.initializer if initializer.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph and all graphs inside its nodes (branches, loop bodies)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs(attribute.g)
            for inner in attribute.graphs:
                yield from graphs(inner)


def strip_metadata(model: ModelProto) -> None:
    """Remove, in place, all documentation and metadata: exporters write source lines and local paths there.

    The model's own metadata_props stay; `write_metadata` fills them.
    """
    model.doc_string = ""
    for graph in graphs(model.graph):
        _clear(graph)
        for node in graph.node:
            _clear(node)
            for attribute in node.attribute:
                attribute.doc_string = ""
        for item in (*graph.value_info, *graph.input, *graph.output, *graph.initializer):
            _clear(item)
    for function in model.functions:
        _clear(function)
        for node in function.node:
            _clear(node)
        for value in function.value_info:
            _clear(value)


def _clear(item: GraphProto | NodeProto | onnx.ValueInfoProto | onnx.TensorProto | onnx.FunctionProto) -> None:
    item.doc_string = ""
    del item.metadata_props[:]
