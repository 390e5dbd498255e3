"""ONNX classifiers as other tools write them, made from the float twin of the tiny world's network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, compose, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from tests.graphs import UINT8, f32, model, node

SHAPE = (1, 16, 16)


def bare(source: Path) -> ModelProto:
    """The graph without a word of where it comes from."""
    made = onnx.load(source)
    del made.metadata_props[:]
    return made


def in_front(
    made: ModelProto, nodes: list[Any], constants: Mapping[str, Any], shape: tuple[Any, ...], kind: int = 1
) -> ModelProto:
    """`made` behind nodes that lead from `image` of the given shape to `fed`."""
    first = model(nodes, constants, shape=shape, kind=kind, outputs={"fed": (1, ("N", *SHAPE))})
    first.opset_import[0].version = made.opset_import[0].version
    first.ir_version = made.ir_version
    second = compose.add_prefix(made, "net_")
    inside = {"net_image": "fed"}
    for entry in second.graph.node:
        entry.input[:] = [inside.get(name, name) for name in entry.input]
    second.graph.input[0].name = "fed"
    return compose.merge_models(first, second, io_map=[("fed", "fed")])


def nhwc(made: ModelProto) -> ModelProto:
    """Channels last."""
    return in_front(made, [node("Transpose", ["image"], ["fed"], perm=[0, 3, 1, 2])], {}, ("N", 16, 16, 1))


def uint8(made: ModelProto) -> ModelProto:
    """Whole numbers up to 255."""
    nodes = [node("Cast", ["image"], ["real"], to=1), node("Div", ["real", "white"], ["fed"])]
    return in_front(made, nodes, {"white": f32(255.0)}, ("N", *SHAPE), UINT8)


def up_to_255(made: ModelProto) -> ModelProto:
    """Pixels in [0, 255] as float."""
    return in_front(made, [node("Div", ["image", "white"], ["fed"])], {"white": f32(255.0)}, ("N", *SHAPE))


def normalised_outside(made: ModelProto, mean: float, std: float) -> ModelProto:
    """Pixels that the caller has normalised."""
    nodes = [node("Mul", ["image", "std"], ["scaled"]), node("Add", ["scaled", "mean"], ["fed"])]
    return in_front(made, nodes, {"mean": f32(mean), "std": f32(std)}, ("N", *SHAPE))


def negative(made: ModelProto) -> ModelProto:
    """Light and dark exchanged."""
    return in_front(made, [node("Sub", ["white", "image"], ["fed"])], {"white": f32(1.0)}, ("N", *SHAPE))


def probabilities(made: ModelProto) -> ModelProto:
    """A softmax at the end."""
    (output,) = made.graph.output
    made.graph.node.append(node("Softmax", [output.name], ["shares"], axis=1))
    made.graph.output[0].name = "shares"
    return made


def sizeless(made: ModelProto) -> ModelProto:
    """Says nothing of the size of its images, nor of its output."""
    for axis in made.graph.input[0].type.tensor_type.shape.dim[2:]:
        axis.dim_param = "any"
    made.graph.output[0].type.tensor_type.ClearField("shape")
    del made.graph.value_info[:]
    return made


def unconvertible(made: ModelProto) -> ModelProto:
    """With an operator that has no twin, and that changes nothing here."""
    (output,) = made.graph.output
    name = output.name
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.array([3], np.int64), "all"))
    made.graph.node.append(node("TopK", [name, "all"], ["values", "places"], axis=1))
    made.graph.node.append(node("ScatterElements", [name, "places", "values"], ["same"], axis=1))
    made.graph.output[0].name = "same"
    return made


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, images: np.ndarray[Any, np.dtype[np.float32]], name: str) -> None:
        self._batches = iter([{name: images}])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


def quantised(source: Path, target: Path, archive: Path, *, operators: bool) -> None:
    """Static int8 by plain onnxruntime; `operators`: QLinearConv and its like in the file, else QDQ."""
    with np.load(archive) as found:
        images = found["x_train"][:100].astype(np.float32) / 255
    made = bare(source)
    plain = source.with_name("plain.onnx")
    onnx.save(made, plain)
    quantize_static(
        plain,
        target,
        _Reader(images, made.graph.input[0].name),
        quant_format=QuantFormat.QOperator if operators else QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


FORMS: Mapping[str, Callable[[ModelProto], ModelProto]] = {
    "float": lambda made: made,
    "nhwc": nhwc,
    "uint8": uint8,
    "probabilities": probabilities,
    "sizeless": sizeless,
}


def detector() -> ModelProto:
    """Boxes and scores."""
    return model(
        [node("Flatten", ["image"], ["flat"]), node("Identity", ["image"], ["boxes"])],
        {},
        shape=("N", *SHAPE),
        outputs={"boxes": (1, ("N", 1, 16, 16)), "flat": (1, ("N", 256, 1))},
    )


def segmenter() -> ModelProto:
    """A label per pixel."""
    return model([node("Relu", ["image"], ["logits"])], {}, shape=("N", *SHAPE), outputs={"logits": (1, ("N", *SHAPE))})


def of_unknown_rank() -> ModelProto:
    """Gives a map per image and does not say so."""
    made = model([node("Relu", ["image"], ["logits"])], {}, shape=("N", 1, "height", "width"))
    made.graph.output[0].type.tensor_type.ClearField("shape")
    return made


def two_inputs() -> ModelProto:
    """An image and a number."""
    made = model([node("Flatten", ["image"], ["flat"]), node("Mul", ["flat", "gain"], ["logits"])], {},
                 shape=("N", *SHAPE), outputs={"logits": (1, ("N", 256))})  # fmt: skip
    made.graph.input.append(helper.make_tensor_value_info("gain", 1, ["N", 256]))
    return made
