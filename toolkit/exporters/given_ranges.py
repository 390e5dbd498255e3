"""Ranges that a training learnt, for the tensors of an ONNX graph that hold the same values.

Names and structures differ between a torch network and its graph; values do not: what the network computes on some
images at a place is looked for among the graph's tensors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto
from torch import Tensor

from toolkit.exporters.observer import exposed_session
from toolkit.exporters.onnx import load_onnx
from toolkit.exporters.ranges import Interval

TOLERANCE = 1e-3
"""Of the largest value: by how much the values of one tensor may differ between torch and ONNX Runtime."""

Place = TypeVar("Place", bound=Hashable)
Float32Array = npt.NDArray[np.float32]


def ranges_by_tensor(
    path: Path, images: Tensor, values: Mapping[Place, Tensor], ranges: Mapping[Place, Interval]
) -> dict[str, Interval]:
    """The ranges by the names of the graph's tensors; places that the graph has no tensor for are left out.

    Args:
        path: a float graph.
        images: float32 [n, C, H, W] in [0, 1].
        values: by place: what the torch network computed there on these images, [n, ...].
        ranges: by place.
    """
    found: dict[str, Interval] = {}
    computed = _tensors(load_onnx(path), images.numpy())
    wanted = {place: np.ascontiguousarray(tensor.numpy()).reshape(len(images), -1) for place, tensor in values.items()}
    for name, tensor in computed.items():
        place = next((place for place, value in wanted.items() if _equal(tensor, value)), None)
        if place is not None:
            found[name] = ranges[place]
    return found


def _tensors(model: ModelProto, images: Float32Array) -> dict[str, Float32Array]:
    """Every float tensor that the graph computes with a row for each image, [n, ...]."""
    constants = {item.name for item in model.graph.initializer}
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    names = [
        name
        for node in model.graph.node
        for name in node.output
        if kinds.get(name) == TensorProto.FLOAT and name not in constants
    ]
    with tempfile.TemporaryDirectory(prefix="toolkit-ranges-") as folder:
        session = exposed_session(model, names, Path(folder) / "exposed.onnx", optimized=False)
        computed = session.run(names, {model.graph.input[0].name: images})
    rows = len(images)
    return {
        name: value.reshape(rows, -1)
        for name, value in zip(names, computed, strict=True)
        if value.ndim > 1 and len(value) == rows
    }


def _equal(one: Float32Array, other: Float32Array) -> bool:
    if one.shape != other.shape:
        return False
    largest = float(np.abs(other).max())
    return largest > 0 and bool(np.abs(one - other).max() <= TOLERANCE * largest)
