from __future__ import annotations

import functools
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_static
from torch import nn

from toolkit.artifacts import Normalization, OnnxModel, Split, TorchModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.cost import integer_coverage
from toolkit.exporters.calibration import MAX_BATCH, MAX_BATCH_BYTES, CalibrationReader, calibration_batch
from toolkit.exporters.input_range import covering_grid, folding_grid, input_range
from toolkit.exporters.onnx import export_onnx, load_onnx, read_metadata
from toolkit.exporters.parity import measure_parity
from toolkit.exporters.precision import layer_precision, precision_faults
from toolkit.exporters.quantize import quantize_int8
from toolkit.exporters.session import OnnxPredictor

from .conftest import Trained
from .small import CIFAR, GREY, Pictures, pictures, tiny, wrap

FAR = Normalization((0.1, 0.5, 0.9), (0.2, 0.2, 0.2))
"""Means too far apart to stand on one grid."""


def export(model: TorchModel, folder: Path) -> OnnxModel:
    return export_onnx(model, folder / "float.onnx", ExportConfig(), metadata={"classes": "a b c"})


@functools.cache
def _tiny_file(channels: int, normalization: Normalization) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return export(wrap(tiny(channels), (channels, 8, 8), normalization), Path(folder)).path.read_bytes()


def tiny_twin(folder: Path, channels: int = 1, normalization: Normalization = GREY) -> OnnxModel:
    """The exported tiny network; exporting takes long, so each is exported once."""
    (folder / "float.onnx").write_bytes(_tiny_file(channels, normalization))
    return OnnxModel(folder / "float.onnx", "fp32")


def constants_of(path: Path) -> dict[str, Any]:
    return {item.name: numpy_helper.to_array(item) for item in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_a_fitted_network_keeps_its_accuracy(trained: Trained, tmp_path: Path, method: Any) -> None:
    config = QuantizeConfig(calibrate=method)
    quantised = quantize_int8(trained.twin, tmp_path / "m.onnx", trained.calibration, config)
    assert quantised.calibration == method
    assert quantised.calibration_images == 256
    assert Counter(layer.precision for layer in quantised.layers) == {"int8": 8}
    images = trained.evaluation.take(np.arange(2000, dtype=np.int64))
    right = {
        name: int((OnnxPredictor(path).predict(images.images).argmax(1) == images.labels).sum())
        for name, path in (("float", trained.twin.path), ("int8", quantised.model.path))
    }
    assert right["float"] > 1400
    assert abs(right["float"] - right["int8"]) <= 10
    assert read_metadata(quantised.model.path) == {"classes": "ten"}
    assert quantised.model.path.stat().st_size < trained.twin.path.stat().st_size / 3


def test_logits_are_float_so_that_ties_are_rare(trained: Trained, tmp_path: Path) -> None:
    path = quantize_int8(trained.twin, tmp_path / "m.onnx", trained.calibration, QuantizeConfig()).model.path
    logits = OnnxPredictor(path).predict(trained.evaluation.take(np.arange(500, dtype=np.int64)).images)
    assert len(np.unique(logits.numpy())) > 4000


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("optimized", [True, False])
def test_the_integer_graph_is_what_numpy_makes_of_its_integers(channels: int, optimized: bool, tmp_path: Path) -> None:
    shape = (channels, 8, 8)
    split = pictures(32, shape)
    model = tiny_twin(tmp_path, channels, GREY if channels == 1 else CIFAR)
    path = quantize_int8(model, tmp_path / "int8.onnx", split, QuantizeConfig()).model.path
    images = split.take(split.indices).images
    wanted, bound = dequantised_reference(path, images)
    found = OnnxPredictor(path, optimized=optimized).predict(images).double()
    difference = (found - wanted).abs()
    assert (difference <= bound).all()
    assert difference.median() < 1e-4


def dequantised_reference(path: Path, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tiny network in float64 on the integers of the file; and the effect of one step of its last activations."""
    graph, constants = onnx.load(path).graph, constants_of(path)
    quantisers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    dequantisers = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    convolution, linear = (next(node for node in graph.node if node.op_type == kind) for kind in ("Conv", "Gemm"))

    def value(name: str, axis: int = 0) -> torch.Tensor:
        node = dequantisers[name]
        integers, scale, zero = (torch.tensor(constants[part].astype(np.float64)) for part in node.input)
        shape = [-1 if index == axis and scale.ndim else 1 for index in range(integers.ndim)]
        return (integers - zero.reshape(shape if zero.ndim else [])) * scale.reshape(shape if scale.ndim else [])

    def quantise(x: torch.Tensor, node: Any) -> torch.Tensor:
        scale = torch.tensor(constants[node.input[1]].astype(np.float64))
        scale = scale.view(1, -1, 1, 1) if scale.ndim else scale
        zero = int(np.ravel(constants[node.input[2]])[0])
        return ((x / scale).round() + zero).clamp(0, 255)

    def dequantise(q: torch.Tensor, node: Any) -> torch.Tensor:
        return (q - float(constants[node.input[2]])) * float(constants[node.input[1]])

    entry = dequantisers[convolution.input[0]]
    x = dequantise(quantise(images.double(), quantisers[0]), entry)
    x = nn.functional.conv2d(x, value(convolution.input[1]), value(convolution.input[2]), 2, 1)
    after = next(node for node in quantisers if node.input[0] == convolution.output[0])
    step = float(constants[after.input[1]])
    x = (quantise(x, after) - float(constants[after.input[2]])) * step
    weights = value(linear.input[1], 0)
    return x.flatten(1) @ weights.T + value(linear.input[2]), step * weights.abs().amax(1) * 1.01


@pytest.mark.parametrize("normalization", [CIFAR, FAR])
def test_weights_are_within_half_a_step_of_the_float_ones_and_padding_is_the_mean(
    normalization: Normalization, tmp_path: Path
) -> None:
    split = pictures(64, (3, 8, 8))
    model = wrap(tiny(3), (3, 8, 8), normalization)
    twin, how = tiny_twin(tmp_path, 3, normalization), QuantizeConfig(equalize=False)
    path = quantize_int8(twin, tmp_path / "q.onnx", split, how).model.path
    constants = constants_of(path)
    linear = next(node for node in onnx.load(path).graph.node if node.op_type == "Gemm")
    producer = next(node for node in onnx.load(path).graph.node if node.output[0] == linear.input[1])
    weights, scale = (constants[name] for name in producer.input[:2])
    wanted = model.network.get_parameter("3.weight").detach().numpy()
    assert weights.dtype == np.int8
    assert scale.shape == (3,)
    assert np.all(np.abs(weights * scale[:, None] - wanted) <= scale[:, None] / 2 * 1.001)
    assert measure_parity(model, OnnxPredictor(path), split).relative < 0.1


@pytest.mark.parametrize("margin", [0.0, 0.1, (0.02, 0.4, 0.1)])
@pytest.mark.parametrize("normalization", [CIFAR, FAR, Normalization((0.0,) * 3, (1.0,) * 3)])
def test_the_input_quantiser_covers_the_margin_and_no_more_than_it_must(
    margin: Any, normalization: Normalization, tmp_path: Path
) -> None:
    # Calibration images that stay in the middle: the range must not come from them.
    split = Split(Pictures(np.full((16, 3, 8, 8), 128, dtype=np.uint8)), np.arange(16, dtype=np.int64))
    found = quantize_int8(
        tiny_twin(tmp_path, 3, normalization), tmp_path / "q.onnx", split, QuantizeConfig(), input_margin=margin
    )
    widest = float(np.max(margin))
    assert found.input_range is not None and found.input_range == input_range(tmp_path / "q.onnx")
    low, high = found.input_range
    assert low <= -widest + 1e-6
    assert high >= 1 + widest - 1e-6
    assert high - low < 1.6 * (1 + 2 * widest)
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "q.onnx").graph.node)
    assert operators["Div"] == (1 if normalization.mean == FAR.mean else operators["Div"])


def test_attacked_pixels_in_the_margin_are_not_clipped(tmp_path: Path) -> None:
    model = wrap(tiny(), (1, 8, 8))
    black_and_white = np.random.default_rng(0).choice(np.array([0, 255], dtype=np.uint8), (64, 1, 8, 8))
    twin, split = tiny_twin(tmp_path), Split(Pictures(black_and_white), np.arange(64, dtype=np.int64))
    images = split.take(split.indices).images * 1.2 - 0.1
    wanted = model.predict(images)
    for margin, follows in ((0.0, False), (0.1, True)):
        config = QuantizeConfig()
        path = quantize_int8(twin, tmp_path / "q.onnx", split, config, input_margin=margin).model.path
        predictor = OnnxPredictor(path)
        clipped = predictor.predict(images.clamp(0, 255 / 254))
        assert torch.equal(predictor.predict(images), clipped) is not follows
        assert bool((predictor.predict(images) - wanted).abs().max() < 0.05 * wanted.std()) is follows


@given(low=st.floats(-50, 0), high=st.floats(0.01, 50))
@settings(max_examples=200, deadline=None)
def test_a_covering_grid_covers(low: float, high: float) -> None:
    grid = covering_grid(low, high)
    step = float(grid.step[0])
    assert -grid.zero_point * step <= low * (1 - 1e-9)
    assert (255 - grid.zero_point) * step >= high * (1 - 1e-9)
    assert step <= (high - low) / 127


@given(
    means=st.lists(st.floats(0.05, 1), min_size=1, max_size=3),
    margin=st.floats(0, 0.5),
)
@settings(max_examples=200, deadline=None)
def test_a_folding_grid_covers_and_puts_every_mean_on_it(means: list[float], margin: float) -> None:
    found = folding_grid(np.array(means), margin)
    if found is None:
        return
    grid, steps = found
    assert np.allclose(grid.step * steps, means)
    assert grid.zero_point + steps <= 255
    assert np.all(grid.zero_point * grid.step >= margin - 1e-6)
    assert np.all((255 - grid.zero_point) * grid.step >= 1 + margin - 1e-6)


def test_grey_images_fold_into_the_quantiser(tmp_path: Path) -> None:
    path = tmp_path / "q.onnx"
    quantize_int8(tiny_twin(tmp_path), path, pictures(16, (1, 8, 8)), QuantizeConfig())
    assert not {"Sub", "Div"} & {node.op_type for node in onnx.load(path).graph.node}
    assert onnx.load(path).graph.node[0].input[0] == "image"


def test_percentile_calibration_cuts_the_tails(trained: Trained, tmp_path: Path) -> None:
    scales = {}
    for name, percentile in (("minmax", 100.0), ("percentile", 99.0)):
        config = QuantizeConfig.model_validate({"calibrate": name, "percentile": percentile})
        path = quantize_int8(trained.twin, tmp_path / f"{name}.onnx", trained.calibration, config).model.path
        scales[name] = {key: float(value) for key, value in constants_of(path).items() if key == "relu_5_scale"}
    assert 0 < scales["percentile"]["relu_5_scale"] < 0.9 * scales["minmax"]["relu_5_scale"]


@pytest.mark.parametrize(("whole", "sizes"), [(False, [40, 40, 40, 30]), (True, [40, 40, 40])])
def test_images_are_streamed_in_batches(whole: bool, sizes: list[int]) -> None:
    split = pictures(150, (1, 8, 8))
    reader = CalibrationReader(split, "image", batch_size=40, whole_batches=whole)
    for _ in range(2):
        assert [len(feed["image"]) for feed in iter(reader.get_next, None)] == sizes
        reader.rewind()
    assert (reader.images, len(reader)) == (sum(sizes), len(sizes))
    assert isinstance(split.images, Pictures)
    assert split.images.largest_request == 40


def test_a_margin_lets_every_batch_come_again_stretched_over_it() -> None:
    split = pictures(40, (1, 8, 8))
    reader = CalibrationReader(split, "image", margin=0.1)
    feeds = [feed["image"] for feed in iter(reader.get_next, None)]
    plain = split.take(split.indices).images.numpy()
    assert (len(reader), reader.images, len(feeds)) == (2, 40, 2)
    assert np.array_equal(feeds[0], plain)
    assert np.allclose(feeds[1], plain * 1.2 - 0.1)
    assert feeds[1].min() < -0.09


@given(image_bytes=st.integers(0, 2**40))
def test_the_activations_of_a_calibration_batch_fit_into_memory(image_bytes: int) -> None:
    size = calibration_batch(image_bytes)
    assert size == 1 or size * image_bytes <= MAX_BATCH_BYTES
    assert size == MAX_BATCH or (size + 1) * image_bytes > MAX_BATCH_BYTES


def test_weights_that_are_no_numbers_are_refused_with_their_layer(tmp_path: Path) -> None:
    for bad in (math.nan, math.inf):
        model = wrap(tiny(), (1, 8, 8))
        with torch.no_grad():
            model.network.get_parameter("0.weight")[1, 0, 2, 2] = bad
        with pytest.raises(ToolkitError, match="no numbers") as caught:
            quantize_int8(export(model, tmp_path), tmp_path / "q.onnx", pictures(8, (1, 8, 8)), QuantizeConfig())
        assert "1 of 36 values of 'network.0.weight'" in caught.value.found
        assert "conv2d" in caught.value.found
        assert not (tmp_path / "q.onnx").exists()


def test_a_quantised_graph_is_not_quantised_again(tmp_path: Path) -> None:
    split, path = pictures(8, (1, 8, 8)), tmp_path / "q.onnx"
    quantize_int8(tiny_twin(tmp_path), path, split, QuantizeConfig())
    with pytest.raises(ToolkitError, match="quantised already") as caught:
        quantize_int8(OnnxModel(path, "deployed"), tmp_path / "r.onnx", split, QuantizeConfig())
    assert "QuantizeLinear" in caught.value.found


def test_what_was_optimised_for_a_processor_is_refused(tmp_path: Path) -> None:
    twin = tiny_twin(tmp_path)
    proto = onnx.load(twin.path)
    proto.graph.node[0].domain = "com.microsoft.nchwc"
    twin.path.write_bytes(proto.SerializeToString())
    with pytest.raises(ToolkitError, match="optimised for one kind of processor") as caught:
        quantize_int8(twin, tmp_path / "q.onnx", pictures(8, (1, 8, 8)), QuantizeConfig())
    assert "blocked layouts: 1 " in caught.value.found


def strangers_file(path: Path, opset: int) -> OnnxModel:
    """A convolution, a product and a softmax, none with a name."""
    generator = np.random.default_rng(0)
    weights = {
        "filters": generator.standard_normal((4, 1, 3, 3)).astype(np.float32),
        "columns": 0.01 * generator.standard_normal((4 * 36, 3)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["image", "filters"], ["made"]),
        helper.make_node("Relu", ["made"], ["kept"]),
        helper.make_node("Flatten", ["kept"], ["flat"]),
        helper.make_node("MatMul", ["flat", "columns"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["probabilities"], axis=1),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 8, 8])
    result = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 3])
    constants = [numpy_helper.from_array(values, name) for name, values in weights.items()]
    graph = helper.make_graph(nodes, "stranger", [image], [result], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7), path)
    return OnnxModel(path, "fp32")


@pytest.mark.parametrize("opset", [11, 12, 13])
def test_old_files_whose_nodes_have_no_names_are_quantised(opset: int, tmp_path: Path) -> None:
    twin = strangers_file(tmp_path / "stranger.onnx", opset)
    found = quantize_int8(twin, tmp_path / "q.onnx", pictures(32, (1, 8, 8)), QuantizeConfig())
    assert [layer.precision for layer in found.layers] == ["int8", "int8"]
    assert len({layer.name for layer in found.layers} - {""}) == 2
    images = torch.rand(16, 1, 8, 8)
    before, after = (OnnxPredictor(path).predict(images) for path in (twin.path, found.model.path))
    assert float((before - after).abs().max()) < 0.1


def test_the_last_batch_of_a_transformer_may_be_smaller(tmp_path: Path) -> None:
    """Attention holds tensors [tokens, images, ...]: what is counted by channel must not take images for channels."""
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    network = torchvision.models.VisionTransformer(**sizes, num_classes=3)
    model, split = wrap(network, (3, 16, 16)), pictures(MAX_BATCH + 7, (3, 16, 16))
    found = quantize_int8(export(model, tmp_path), tmp_path / "q.onnx", split, QuantizeConfig())
    assert found.calibration_images == MAX_BATCH + 7


def test_no_calibration_images_are_an_error(tmp_path: Path) -> None:
    twin = tiny_twin(tmp_path)
    with pytest.raises(ToolkitError, match="no calibration images"):
        quantize_int8(twin, tmp_path / "q.onnx", pictures(8, (1, 8, 8)).first(0), QuantizeConfig())


def test_images_that_do_not_fit_the_graph_are_refused(tmp_path: Path) -> None:
    for shape in ((3, 8, 8), (1, 9, 8)):
        with pytest.raises(ToolkitError, match="do not fit the graph"):
            quantize_int8(tiny_twin(tmp_path), tmp_path / "q.onnx", pictures(8, shape), QuantizeConfig())


def test_a_graph_with_a_fixed_batch_is_calibrated_in_that(tmp_path: Path) -> None:
    twin = tiny_twin(tmp_path)
    proto = onnx.load(twin.path)
    for value in (proto.graph.input[0], proto.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    del proto.graph.value_info[:]
    twin.path.write_bytes(proto.SerializeToString())
    found = quantize_int8(twin, tmp_path / "q.onnx", pictures(8, (1, 8, 8)), QuantizeConfig())
    assert found.calibration_images == 6
    assert OnnxPredictor(found.model.path).predict(torch.rand(4, 1, 8, 8)).shape == (4, 3)
    with pytest.raises(ToolkitError, match="too few calibration images"):
        quantize_int8(twin, tmp_path / "q.onnx", pictures(2, (1, 8, 8)), QuantizeConfig())


def test_a_float_graph_has_no_input_quantiser(tmp_path: Path) -> None:
    assert input_range(tiny_twin(tmp_path).path) is None


def test_planted_defects_are_found(tmp_path: Path) -> None:
    twin, split = tiny_twin(tmp_path), pictures(8, (1, 8, 8))
    for name, options, fault in (
        ("per-tensor", {"per_channel": False, "activation_type": QuantType.QUInt8}, "1 scale(s) for"),
        ("s8s8", {"per_channel": True, "activation_type": QuantType.QInt8}, "activations are int8"),
        ("u8u8", {"per_channel": True, "activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8}, "uint8"),
        ("some", {"per_channel": True, "activation_type": QuantType.QUInt8, "op_types_to_quantize": ["Conv"]}, "float"),
    ):
        path = tmp_path / f"{name}.onnx"
        reader = CalibrationReader(split, "image")
        quantize_static(twin.path, path, reader, **options)
        faults = precision_faults(load_onnx(path))
        assert any(fault in line for line in faults), (name, faults)
    assert [layer.precision for layer in layer_precision(load_onnx(path))] == ["int8", "float32"]
    good = quantize_int8(twin, tmp_path / "good.onnx", split, QuantizeConfig()).model.path
    assert precision_faults(load_onnx(good)) == ()
    whole = QuantizeConfig(per_channel=False)
    assert not quantize_int8(twin, tmp_path / "whole.onnx", split, whole).per_channel


class Tokens(nn.Module):
    """Patches, a residual block, LayerNorm, the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.norm = nn.LayerNorm(16)
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = tokens + self.block(tokens)
        logits: torch.Tensor = self.last(self.norm(tokens).mean(1))
        return logits


def test_transformers_keep_their_residual_stream_float_and_their_products_integer(tmp_path: Path) -> None:
    model, split = wrap(Tokens(), (3, 16, 16)), pictures(64, (3, 16, 16))
    found = quantize_int8(export(model, tmp_path), tmp_path / "q.onnx", split, QuantizeConfig())
    assert {layer.precision for layer in found.layers} == {"int8"}
    assert integer_coverage(found.model.path).share == 1
    nodes = onnx.load(found.model.path).graph.node
    producers = {node.output[0]: node.op_type for node in nodes}
    assert [producers[node.input[0]] for node in nodes if node.op_type == "LayerNormalization"][-1] == "Add"
    assert measure_parity(model, OnnxPredictor(found.model.path), split).relative < 0.3


def test_nothing_is_printed_and_the_file_holds_no_path(
    trained: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = QuantizeConfig(calibrate="percentile")
    path = quantize_int8(trained.twin, tmp_path / "m.onnx", trained.calibration.first(64), config).model.path
    assert capfd.readouterr() == ("", "")
    proto = onnx.load(path)
    assert str(tmp_path).encode() not in path.read_bytes()
    assert b".py" not in path.read_bytes()
    assert all(not node.metadata_props and not node.doc_string for node in proto.graph.node)
    onnx.checker.check_model(proto, full_check=True)
