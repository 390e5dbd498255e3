"""float16 of the float twin, for GPUs: half the bytes, inputs and outputs still float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

from toolkit.artifacts import Split
from toolkit.errors import ToolkitError
from toolkit.exporters.admission import fixed_batch
from toolkit.exporters.calibration import CalibrationReader, calibration_batch
from toolkit.exporters.observer import activation_bytes, observe
from toolkit.exporters.onnx import load_onnx, save_onnx
from toolkit.exporters.qdq import finish

LARGEST = float(np.finfo(np.float16).max)
FIX = "ship float32 on this GPU, or train with more --weight-decay so that values stay smaller"


def write_half(source: Path, output: Path, calibration: Split) -> float:
    """Write the float16 form of a float graph.

    ONNX Runtime computes it in float32 on CPUs without such arithmetic, so that an overflow would not show there: what
    the layers make of the calibration images is held against the largest float16.

    Args:
        source: a float ONNX classifier.
        output: the file to write.
        calibration: images, streamed.

    Returns:
        the largest magnitude of any activation.

    Raises:
        ToolkitError: a weight or an activation that float16 cannot hold.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16  # not with the module: it is rarely needed

    model = load_onnx(source)
    for item in model.graph.initializer:
        values = numpy_helper.to_array(item)
        if values.dtype == np.float32 and values.size and np.abs(values).max() > LARGEST:
            raise _too_large(source, f"the weight '{item.name}' reaches {np.abs(values).max():.3g}")
    largest, where = _largest_activation(model, source, calibration)
    if largest > LARGEST:
        raise _too_large(source, f"'{where}' reaches {largest:.3g} on the calibration images")
    made: ModelProto = convert_float_to_float16(model, keep_io_types=True)
    _sort(made)
    finish(made, model)
    save_onnx(made, output)
    return largest


def _sort(model: ModelProto) -> None:
    """Put every node behind those that it reads from, in place: the converter appends its casts at the end."""
    waiting = list(model.graph.node)
    made = {"", *(item.name for item in model.graph.initializer), *(value.name for value in model.graph.input)}
    ordered = []
    while waiting:
        ready = [node for node in waiting if made.issuperset(node.input)]
        if not ready:
            raise RuntimeError(f"the float16 graph is no graph: nothing makes an input of '{waiting[0].name}'")
        ordered += ready
        made.update(name for node in ready for name in node.output)
        waiting = [node for node in waiting if not made.issuperset(node.output)]
    del model.graph.node[:]
    model.graph.node.extend(ordered)


def _too_large(path: Path, found: str) -> ToolkitError:
    return ToolkitError(
        "the network does not fit into float16", found=f"{path}: {found}; float16 ends at {LARGEST:,.0f}", fix=FIX
    )


def _largest_activation(model: ModelProto, path: Path, calibration: Split) -> tuple[float, str]:
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.value_info, *inferred.graph.output)
    tensors = [value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT]
    fixed = fixed_batch(model, path, calibration)
    size = fixed or calibration_batch(activation_bytes(inferred, tensors))
    name = model.graph.input[0].name
    reader = CalibrationReader(calibration, name, batch_size=size, whole_batches=fixed is not None)
    seen = observe(inferred, tensors, reader, histograms=False)
    return max((max(-one.low, one.high), name) for name, one in seen.items())
