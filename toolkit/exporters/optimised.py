"""What ONNX Runtime makes of a quantised graph when it optimises it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
from onnx import ModelProto

from toolkit.errors import ToolkitError
from toolkit.exporters.session import make_session

ACTIVATIONS = ("Relu",)
"""Which the runtime fuses into the convolution in front, and which leave the sums that they let pass as they are."""


LAYERS = ("Conv", "FusedConv", "Softmax")


def layers_in_float(path: Path, model: ModelProto) -> frozenset[str]:
    """Outputs of the convolutions and softmaxes of a quantised graph that the runtime leaves in float on this machine.

    Those in its blocked layout (nchwc) are left out: they sum in another order.

    Args:
        path: the file.
        model: what is in it.
    """
    kinds = {node.op_type for node in model.graph.node}
    if "QuantizeLinear" not in kinds or kinds.isdisjoint(LAYERS):
        return frozenset()
    try:
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "optimised.onnx"
            make_session(path, optimized_path=written)
            optimised = onnx.load(written, load_external_data=False)
    except ToolkitError:  # whoever scores on the file will be told what is wrong with it
        return frozenset()
    domains = ("", "ai.onnx", "com.microsoft")
    nodes = optimised.graph.node
    floats = {node.output[0] for node in nodes if node.op_type in LAYERS and node.domain in domains}
    fused = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type in ACTIVATIONS}
    layers = [node.output[0] for node in model.graph.node if node.op_type in LAYERS]
    return frozenset(name for name in layers if name in floats or fused.get(name) in floats)
