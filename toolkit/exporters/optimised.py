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


def convolutions_in_float(path: Path, model: ModelProto) -> frozenset[str]:
    """Outputs of the convolutions of a quantised graph for which the runtime, on this machine, has no integer kernel.

    Those in its blocked layout (nchwc) are left out: they sum in another order.

    Args:
        path: the file.
        model: what is in it.
    """
    kinds = {node.op_type for node in model.graph.node}
    if not {"QuantizeLinear", "Conv"} <= kinds:
        return frozenset()
    try:
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder) / "optimised.onnx"
            make_session(path, optimized_path=written)
            optimised = onnx.load(written, load_external_data=False)
    except ToolkitError:  # whoever scores on the file will be told what is wrong with it
        return frozenset()
    floats = {
        node.output[0]
        for node in optimised.graph.node
        if node.op_type in ("Conv", "FusedConv") and node.domain in ("", "ai.onnx", "com.microsoft")
    }
    fused = {node.input[0]: node.output[0] for node in model.graph.node if node.op_type in ACTIVATIONS}
    convolutions = [node.output[0] for node in model.graph.node if node.op_type == "Conv"]
    return frozenset(name for name in convolutions if name in floats or fused.get(name) in floats)
