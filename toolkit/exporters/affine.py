"""BatchNorms that fold into no layer (behind a concatenation, as in DenseNet) as depthwise 1x1 convolutions.

A BatchNormalization in inference is one factor and one offset per channel. ONNX Runtime has no integer kernel for it,
so it stays a float island with changes of type on both sides; a depthwise convolution has one, and with a weight scale
per channel its single weight is exact in eight bits. Mul and Add have integer kernels too, but round twice, on grids
that all channels share, and were slower (docs/results).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from toolkit.exporters.rewrites import remove_unused_initializers, tensor_ranks


def norms_to_convolutions(model: ModelProto, keep: Collection[str] = ()) -> None:
    """Rewrite, in place, every BatchNormalization of an image with constant statistics; its node keeps its name.

    Args:
        model: a float graph.
        keep: names of nodes to leave as they are.
    """
    graph, ranks = model.graph, tensor_ranks(model)
    constants = {item.name: item for item in graph.initializer}
    for index, node in enumerate(graph.node):
        known = set(node.input[1:]) <= set(constants)
        if node.op_type != "BatchNormalization" or node.name in keep or not known or ranks.get(node.input[0]) != 4:
            continue
        factor, offset = _affine(node, [numpy_helper.to_array(constants[name]) for name in node.input[1:]])
        names = [f"{node.output[0]}_factor", f"{node.output[0]}_offset"]
        for name, values in zip(names, (factor.reshape(-1, 1, 1, 1), offset), strict=True):
            graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
        convolution = helper.make_node(
            "Conv", [node.input[0], *names], node.output[:1], name=node.name, kernel_shape=[1, 1], group=len(factor)
        )
        graph.node[index].CopyFrom(convolution)
    remove_unused_initializers(graph)


def _affine(node: NodeProto, constants: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Factor and offset per channel, float64 [C]."""
    scale, bias, mean, variance = (values.astype(np.float64) for values in constants)
    epsilon = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
    factor = scale / np.sqrt(variance + epsilon)
    return factor, bias - mean * factor
