"""Symmetric int8 for TensorRT and float16 for CUDA: what the files hold, and what is refused."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from toolkit.artifacts import Normalization, OnnxModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.half import write_half
from toolkit.exporters.input_range import input_range
from toolkit.exporters.onnx import export_onnx, load_onnx, read_metadata
from toolkit.exporters.quantize import Quantizer, quantize_int8
from toolkit.exporters.session import OnnxPredictor
from toolkit.exporters.target_kinds import TARGETS, chosen_targets, target_file
from toolkit.exporters.tensorrt import tensorrt_faults

from .conftest import Trained
from .small import CIFAR, GREY, onnx_file, pictures, wrap


@functools.cache
def _exported(channels: int, normalization: Normalization) -> bytes:
    torch.manual_seed(3)
    body = (nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten())
    model = wrap(nn.Sequential(*body, nn.Linear(144, 3)), (channels, 8, 8), normalization)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "float.onnx")
        return export_onnx(model, path, ExportConfig(), metadata={"classes": "a b c"}).path.read_bytes()


def exported(folder: Path, channels: int = 1, normalization: Normalization = GREY) -> OnnxModel:
    """The small network's float twin; exporting takes long, so each is exported once."""
    (folder / "float.onnx").write_bytes(_exported(channels, normalization))
    return OnnxModel(folder / "float.onnx", "fp32")


def tensorrt(folder: Path, channels: int = 1, normalization: Normalization = GREY, margin: float = 0.0) -> ModelProto:
    twin, split = exported(folder, channels, normalization), pictures(32, (channels, 8, 8))
    Quantizer(twin, split, QuantizeConfig(), input_margin=margin).write_tensorrt(folder / "model.trt.onnx")
    return load_onnx(folder / "model.trt.onnx")


def test_the_file_for_tensorrt_is_symmetric_int8_with_float_biases(tmp_path: Path) -> None:
    model = tensorrt(tmp_path)
    constants = {item.name: item for item in model.graph.initializer}
    quantisers = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    points = [constants[node.input[2]] for node in quantisers]
    assert len(quantisers) == 9
    assert {point.data_type for point in points} == {TensorProto.INT8}
    assert all(not numpy_helper.to_array(point).any() for point in points)
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert [constants[node.input[2]].data_type for node in layers] == [TensorProto.FLOAT] * 3
    assert tensorrt_faults(model) == () and read_metadata(tmp_path / "model.trt.onnx") == {"classes": "a b c"}


def test_no_quantiser_parts_a_layer_from_its_activation(tmp_path: Path) -> None:
    graph = tensorrt(tmp_path).graph
    readers = {name: node.op_type for node in graph.node for name in node.input}
    assert [readers.get(node.output[0]) for node in graph.node if node.op_type in ("Conv", "Gemm")] == [
        "Relu",
        "Relu",
        None,
    ]


@pytest.mark.parametrize(("channels", "normalization", "margin"), [(1, GREY, 0.0), (3, CIFAR, 0.0), (3, CIFAR, 0.05)])
def test_the_symmetric_input_quantiser_covers_all_pixels(
    channels: int, normalization: Normalization, margin: float, tmp_path: Path
) -> None:
    tensorrt(tmp_path, channels, normalization, margin)
    found = input_range(tmp_path / "model.trt.onnx")
    assert found is not None and found[0] <= -margin + 1e-6 and found[1] >= 1 + margin - 1e-6


def test_the_file_for_tensorrt_keeps_the_accuracy(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "model.trt.onnx"
    Quantizer(trained.twin, trained.calibration, QuantizeConfig(keep_float=("node_conv2d",))).write_tensorrt(path)
    batch = trained.evaluation.take(np.arange(1000, dtype=np.int64))
    right = [
        int((OnnxPredictor(file).predict(batch.images).argmax(1) == batch.labels).sum())
        for file in (trained.twin.path, path)
    ]
    assert right[0] > 700 and abs(right[0] - right[1]) <= 10
    assert tensorrt_faults(load_onnx(path), kept=["node_conv2d"]) == ()
    assert "node_conv2d: an input is not quantised" in tensorrt_faults(load_onnx(path))


def test_the_graph_for_cpus_is_none_for_tensorrt(tmp_path: Path) -> None:
    twin, split = exported(tmp_path), pictures(32, (1, 8, 8))
    found = tensorrt_faults(load_onnx(quantize_int8(twin, tmp_path / "m.onnx", split, QuantizeConfig()).model.path))
    assert "image_QuantizeLinear: it is uint8, not int8" in found
    assert "node_conv2d: its bias is quantised" in found


def test_every_rule_of_tensorrt_is_checked(tmp_path: Path) -> None:
    model = tensorrt(tmp_path)
    (first, *_) = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]

    def with_constant(name: str, values: npt.NDArray[np.generic]) -> ModelProto:
        changed = ModelProto()
        changed.CopyFrom(model)
        (old,) = [item for item in changed.graph.initializer if item.name == name]
        old.CopyFrom(numpy_helper.from_array(values, name))
        return changed

    faults = tensorrt_faults(with_constant(first.input[2], np.array(3, np.int8)))
    assert faults[0] == f"{first.name}: its zero point is not 0"
    faults = tensorrt_faults(with_constant(first.input[1], np.array(0, np.float32)))
    assert faults[0] == f"{first.name}: its scale is no positive constant"
    bare, foreign = ModelProto(), ModelProto()
    bare.CopyFrom(model)
    foreign.CopyFrom(model)
    (node,) = [node for node in bare.graph.node if node.name == first.name]
    del node.input[2]
    assert tensorrt_faults(bare)[0] == f"{first.name}: its zero point is no constant"
    foreign.graph.node[0].domain = "com.microsoft"
    assert tensorrt_faults(foreign)[0] == f"{foreign.graph.node[0].name}: domain com.microsoft"


def test_float16_halves_the_file_and_keeps_what_goes_in_and_out(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "model.fp16.onnx"
    largest = write_half(trained.twin.path, path, trained.calibration)
    model = load_onnx(path)
    assert {value.type.tensor_type.elem_type for value in (model.graph.input[0], model.graph.output[0])} == {
        TensorProto.FLOAT
    }
    weights = [item for item in model.graph.initializer if len(item.dims) > 1]
    assert weights and {item.data_type for item in weights} == {TensorProto.FLOAT16}
    assert path.stat().st_size < 0.52 * trained.twin.path.stat().st_size
    assert read_metadata(path) == {"classes": "ten"} and not any(node.doc_string for node in model.graph.node)
    images = trained.evaluation.take(np.arange(300, dtype=np.int64)).images
    wanted, found = (OnnxPredictor(file).predict(images) for file in (trained.twin.path, path))
    assert 0 < float((found - wanted).abs().max()) < 0.01 * float(wanted.std())
    assert float(wanted.abs().max()) / 2 < largest < 65504


@pytest.mark.parametrize(
    ("scale", "gain", "words"), [(1e5, 1.0, "the weight 'w'"), (1.0, 6e4, "on the calibration images")]
)
def test_what_float16_cannot_hold_is_refused(scale: float, gain: float, words: str, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Flatten", ["image"], ["x"], "flat"),
        helper.make_node("Gemm", ["x", "w"], ["y"], "first"),
        helper.make_node("Mul", ["y", "g"], ["logits"], "gain"),
    ]
    weights = np.full((64, 3), scale, np.float32)
    path = onnx_file(tmp_path / "m.onnx", nodes, ["N", 1, 8, 8], w=weights, g=np.float32(gain))
    with pytest.raises(ToolkitError) as caught:
        write_half(path, tmp_path / "h.onnx", pictures(8, (1, 8, 8)))
    assert "does not fit into float16" in caught.value.problem and words in caught.value.found
    assert not (tmp_path / "h.onnx").exists()


def test_targets_are_known_by_name_and_each_is_written_once() -> None:
    assert chosen_targets(QuantizeConfig(targets=("cuda", "tensorrt", "cuda"))) == (
        TARGETS["cuda"],
        TARGETS["tensorrt"],
    )
    assert target_file("model.onnx", TARGETS["tensorrt"]) == "model.trt.onnx"
    with pytest.raises(ToolkitError) as caught:
        chosen_targets(QuantizeConfig(targets=("tensort",)))
    assert caught.value.found == "'tensort'" and "did you mean 'tensorrt'?" in caught.value.fix


def test_onnx_accepts_both_files(trained: Trained, tmp_path: Path) -> None:
    write_half(trained.twin.path, tmp_path / "h.onnx", trained.calibration)
    tensorrt(tmp_path)
    for name in ("h.onnx", "model.trt.onnx"):
        onnx.checker.check_model(tmp_path / name, full_check=True)
