from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from tests.graphs import FLOAT, UINT8, f32, i64, model, node, save, weights
from toolkit.artifacts import Normalization
from toolkit.errors import ToolkitError
from toolkit.exporters.interface import interface_of, read_interface, with_normalization
from toolkit.exporters.session import OnnxPredictor

LINEAR = {"w": weights(4 * 6 * 3, 5), "zero": f32(0)}
IMAGES = torch.rand(4, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def linear(shape: Any, kind: int = FLOAT, *, tail: tuple[str, ...] = (), perm: bool = False) -> Any:
    """Flatten and one matrix product, in the order NCHW whatever the layout; then operators of one input."""
    nodes = [node("Cast", ["image"], ["cast"], to=FLOAT)]
    nodes.append(node("Transpose", ["cast"], ["nchw"], perm=[0, 3, 1, 2] if perm else [0, 1, 2, 3]))
    nodes += [node("Flatten", ["nchw"], ["flat"]), node("MatMul", ["flat", "w"], ["out0"])]
    for number, operator in enumerate(tail):
        nodes.append(node(operator, [f"out{number}"], [f"out{number + 1}"]))
    nodes.append(node("Identity", [f"out{len(tail)}"], ["logits"]))
    return model(nodes, LINEAR, shape=shape, kind=kind)


def wanted(images: torch.Tensor = IMAGES) -> torch.Tensor:
    return images.flatten(1) @ torch.from_numpy(LINEAR["w"])


def test_our_own_form_is_read(tmp_path: Path) -> None:
    found = read_interface(save(linear(("N", 3, 4, 6)), tmp_path / "m.onnx"))
    assert (found.layout, found.dtype, found.pixel_scale, found.output) == ("NCHW", "float32", 1.0, "logits")
    assert (found.input_shape, found.classes, found.batch, found.logits_name) == ((3, 4, 6), 5, None, "logits")


def test_channels_last_images_are_turned(tmp_path: Path) -> None:
    predictor = OnnxPredictor(save(linear((4, 4, 6, 3), perm=True), tmp_path / "m.onnx"))
    assert (predictor.interface.layout, predictor.input_shape, predictor.interface.batch) == ("NHWC", (3, 4, 6), 4)
    torch.testing.assert_close(predictor.predict(IMAGES), wanted())


def test_whole_number_pixels_are_rounded_half_to_even(tmp_path: Path) -> None:
    predictor = OnnxPredictor(save(linear(("N", 3, 4, 6), UINT8), tmp_path / "m.onnx"))
    assert predictor.interface.pixel_scale == 255
    images = (torch.arange(3 * 4 * 6).view(1, 3, 4, 6) + 0.5) / 255
    halves = torch.from_numpy(np.rint(np.float32(255) * images.numpy()))
    torch.testing.assert_close(predictor.predict(images), wanted(halves))
    torch.testing.assert_close(
        predictor.predict(IMAGES * 3 - 1), wanted((255 * (IMAGES * 3 - 1)).round().clamp(0, 255))
    )


def test_half_precision_images(tmp_path: Path) -> None:
    predictor = OnnxPredictor(save(linear(("N", 3, 4, 6), TensorProto.FLOAT16), tmp_path / "m.onnx"))
    torch.testing.assert_close(predictor.predict(IMAGES), wanted(IMAGES.half().float()))


def test_probabilities_become_their_logarithms(tmp_path: Path) -> None:
    predictor = OnnxPredictor(save(linear(("N", 3, 4, 6), tail=("Softmax",)), tmp_path / "m.onnx"))
    assert (predictor.interface.output, predictor.interface.logits_name) == ("probabilities", "out0")
    torch.testing.assert_close(predictor.predict(IMAGES), wanted().log_softmax(1))
    saturated = predictor.predict(IMAGES * 10_000)
    assert bool(saturated.isfinite().all())  # a probability of 0 has no logarithm


def test_logarithms_of_probabilities_are_logits(tmp_path: Path) -> None:
    assert read_interface(save(linear(("N", 3, 4, 6), tail=("LogSoftmax",)), tmp_path / "m.onnx")).output == "logits"


def test_normalisation_outside_the_graph(tmp_path: Path) -> None:
    path = save(linear(("N", 3, 4, 6)), tmp_path / "m.onnx")
    normalization = Normalization((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
    predictor = OnnxPredictor(path, interface=read_interface(path, normalization=normalization))
    shape = (1, 3, 1, 1)
    normalised = (IMAGES - torch.tensor(normalization.mean).view(shape)) / torch.tensor(normalization.std).view(shape)
    torch.testing.assert_close(predictor.predict(IMAGES), wanted(normalised))


@pytest.mark.parametrize(("kind", "channels"), [(UINT8, 3), (FLOAT, 1)])
def test_a_normalisation_that_does_not_fit_is_refused(kind: int, channels: int) -> None:
    found = interface_of(linear(("N", 3, 4, 6), kind), "m.onnx")
    with pytest.raises(ToolkitError, match="normalisation does not fit"):
        with_normalization(found, Normalization((0.5,) * channels, (0.5,) * channels), "m.onnx")


def test_classes_that_the_file_does_not_tell_are_counted_on_one_image(tmp_path: Path) -> None:
    made = linear(("N", 3, 4, 6))
    made.graph.node[-1].op_type, made.graph.node[-1].domain = "Unknown", "x.y"
    assert interface_of(made, "m.onnx").classes is None
    nodes = [node("Reshape", ["image", "target"], ["logits"])]
    path = save(model(nodes, {"target": i64([-1, 9])}, outputs={"logits": (FLOAT, ("N", "K"))}), tmp_path / "m.onnx")
    assert OnnxPredictor(path).interface.classes in (9, None)


def test_sizes_may_be_free(tmp_path: Path) -> None:
    nodes = [node("GlobalAveragePool", ["image"], ["pooled"]), node("Flatten", ["pooled"], ["logits"])]
    outputs = {"logits": (FLOAT, ("N", "K"))}
    predictor = OnnxPredictor(save(model(nodes, {}, shape=("N", None, "H", "W"), outputs=outputs), tmp_path / "m.onnx"))  # type: ignore[arg-type]
    assert (predictor.input_shape, predictor.interface.classes) == ((None, None, None), None)
    torch.testing.assert_close(predictor.predict(IMAGES), IMAGES.mean((2, 3)))


def test_of_several_outputs_the_one_of_classes_is_taken(tmp_path: Path) -> None:
    made = linear(("N", 3, 4, 6))
    made.graph.node.append(node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0))
    made.graph.output.insert(0, helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]))
    predictor = OnnxPredictor(save(made, tmp_path / "m.onnx"))
    torch.testing.assert_close(predictor.predict(IMAGES), wanted())


def test_initialisers_among_the_inputs_are_no_inputs() -> None:
    made = linear(("N", 3, 4, 6))
    made.graph.input.append(helper.make_tensor_value_info("w", FLOAT, [72, 5]))
    assert interface_of(made, "m.onnx").input_name == "image"


@pytest.mark.parametrize("shape", [("N", 7), ("N", 3, 4, 6, 2)])
def test_no_image_input_is_refused(shape: Any) -> None:
    with pytest.raises(ToolkitError, match="no image classifier") as caught:
        interface_of(linear(shape), "m.onnx")
    assert "image: float [any, " in caught.value.found


def test_several_inputs_are_refused() -> None:
    made = linear(("N", 3, 4, 6))
    made.graph.input.append(helper.make_tensor_value_info("mask", FLOAT, ["N"]))
    with pytest.raises(ToolkitError, match="no image classifier") as caught:
        interface_of(made, "m.onnx")
    assert "mask: float [any]" in caught.value.found


def test_an_odd_number_of_channels_is_refused() -> None:
    with pytest.raises(ToolkitError, match="takes no images") as caught:
        interface_of(linear(("N", 7, 4, 6)), "m.onnx")
    assert "1, 3 or 4 channels" in caught.value.found


@pytest.mark.parametrize(
    "outputs",
    [
        {"logits": (FLOAT, ("N", 5)), "flat": (FLOAT, ("N", 72))},
        {"nchw": (FLOAT, ("N", 3, 4, 6))},
        {"boxes": (FLOAT, ("N", 100, 4)), "labels": (TensorProto.INT64, ("N", 100))},
    ],
)
def test_other_outputs_than_classes_are_refused(outputs: Any) -> None:
    made = linear(("N", 3, 4, 6))
    del made.graph.output[:]
    made.graph.output.extend(helper.make_tensor_value_info(name, *parts) for name, parts in outputs.items())
    with pytest.raises(ToolkitError, match="no classifier") as caught:
        interface_of(made, "m.onnx")
    assert "detectors" in caught.value.fix and next(iter(outputs)) in caught.value.found


def test_an_output_that_turns_out_to_be_no_classes_is_refused(tmp_path: Path) -> None:
    nodes = [node("Reshape", ["image", "target"], ["logits"]), node("Shape", ["image"], ["shape"])]
    nodes.append(node("Slice", ["shape", "i0", "i2"], ["target"]))
    nodes = [nodes[1], nodes[2], node("Concat", ["target", "minus"], ["whole"], axis=0)]
    nodes.append(node("Reshape", ["image", "whole"], ["logits"]))
    constants = {"i0": i64([0]), "i2": i64([2]), "minus": i64([-1])}
    path = save(model(nodes, constants, shape=("N", 3, 4, 6)), tmp_path / "m.onnx")
    with pytest.raises(ToolkitError, match="no classifier"):
        OnnxPredictor(path)
