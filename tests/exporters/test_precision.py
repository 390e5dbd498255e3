from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from toolkit.artifacts import OnnxModel, Split, TorchModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.cost import integer_coverage
from toolkit.evaluators.fake_quantised import fake_quantise
from toolkit.evaluators.surrogate import build_twin, twin_model
from toolkit.exporters.onnx import export_onnx, load_onnx
from toolkit.exporters.parity import measure_parity
from toolkit.exporters.precision import between_float, float_weights, layer_precision, named_layers
from toolkit.exporters.quantize import Quantizer, quantize_int8
from toolkit.exporters.session import OnnxPredictor

from .small import CIFAR, pictures, wrap


class Residual(nn.Module):
    """Four convolutions, pooling, a shortcut around two of them, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.three, self.four = (
            nn.Conv2d(3 if index == 0 else 8, 8, 3, padding=1) for index in range(4)
        )
        self.pool, self.last = nn.MaxPool2d(2), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.one(x).relu())
        x = (x + self.three(self.two(x).relu())).relu()
        logits: torch.Tensor = self.last(self.four(x).relu().mean((2, 3)))
        return logits


LAYERS = ("node_conv2d", "node_conv2d_1", "node_conv2d_2", "node_conv2d_3", "node_linear")


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[TorchModel, OnnxModel]:
    model = wrap(Residual(), (3, 8, 8), CIFAR)
    return model, export_onnx(model, tmp_path_factory.mktemp("residual") / "float.onnx", ExportConfig())


def split() -> Split:
    return pictures(64, (3, 8, 8))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    "kept", [(), LAYERS[:1], LAYERS[1:2], LAYERS[2:3], LAYERS[:4], LAYERS[-1:], LAYERS[1:], (LAYERS[0], LAYERS[3])]
)
def test_layers_that_are_kept_compute_in_float_and_all_others_in_integers(
    residual: tuple[TorchModel, OnnxModel], kept: tuple[str, ...], tmp_path: Path
) -> None:
    model, twin = residual
    config = QuantizeConfig(keep_float=kept)
    found = quantize_int8(twin, tmp_path / "q.onnx", split(), config)
    assert [layer.name for layer in found.layers if layer.precision == "float32"] == list(kept)
    assert [layer.name for layer in found.layers] == list(LAYERS)
    kernels = {row.layer: row.integer for row in integer_coverage(found.model.path).layers}
    assert kernels == {name: name not in kept for name in LAYERS}
    assert (found.input_range is None) == (LAYERS[0] in kept)
    predictor = OnnxPredictor(found.model.path)
    assert measure_parity(model, predictor, split()).relative < 0.1
    images = split().take(np.arange(16, dtype=np.int64)).images
    twin_of_it = twin_model(build_twin(found.model.path), model.spec.class_names)
    assert torch.allclose(twin_of_it.predict(images), predictor.predict(images), atol=1e-4)


def test_nothing_is_quantised_between_float_layers(residual: tuple[TorchModel, OnnxModel], tmp_path: Path) -> None:
    """With all but the last convolution float, one tensor is quantised: what it reads (and what the Gemm reads)."""
    twin = residual[1]
    found = quantize_int8(twin, tmp_path / "q.onnx", split(), QuantizeConfig(keep_float=LAYERS[:3]))
    quantised = [node.input[0] for node in onnx.load(found.model.path).graph.node if node.op_type == "QuantizeLinear"]
    graph = onnx.load(twin.path).graph
    read = {node.name: node.input[0] for node in graph.node}
    assert set(quantised) >= {read["node_conv2d_3"], read["node_linear"]}
    assert not set(quantised) & {read[name] for name in LAYERS[:3]}
    whole = quantize_int8(twin, tmp_path / "all.onnx", split(), QuantizeConfig())
    assert operators(found.model.path)["QuantizeLinear"] < operators(whole.model.path)["QuantizeLinear"] / 2


def test_one_calibration_serves_many_graphs(residual: tuple[TorchModel, OnnxModel], tmp_path: Path) -> None:
    quantizer = Quantizer(residual[1], split(), QuantizeConfig(calibrate="mse"))
    assert quantizer.layers == LAYERS
    for kept in ((), LAYERS[:2]):
        quantizer.write(tmp_path / "many.onnx", keep_float=kept)
        quantize_int8(residual[1], tmp_path / "one.onnx", split(), QuantizeConfig(calibrate="mse", keep_float=kept))
        assert (tmp_path / "many.onnx").read_bytes() == (tmp_path / "one.onnx").read_bytes()


def test_patterns_name_layers_and_what_names_none_is_refused(
    residual: tuple[TorchModel, OnnxModel], tmp_path: Path
) -> None:
    twin = load_onnx(residual[1].path)
    assert named_layers(twin, ["node_linear", "node_conv2d_*"]) == LAYERS[1:]
    assert named_layers(twin, []) == ()
    for pattern, words in (("node_conv2", "did you mean"), ("conv*", "node_conv2d")):
        with pytest.raises(ToolkitError, match="unknown layer to leave float") as caught:
            quantize_int8(residual[1], tmp_path / "q.onnx", split(), QuantizeConfig(keep_float=(pattern,)))
        assert words in caught.value.fix
    with pytest.raises(ToolkitError, match="no layer is left"):
        quantize_int8(residual[1], tmp_path / "q.onnx", split(), QuantizeConfig(keep_float=("*",)))
    assert not (tmp_path / "q.onnx").exists()


def test_the_fake_quantised_network_has_the_same_layers_float(
    residual: tuple[TorchModel, OnnxModel], tmp_path: Path
) -> None:
    model, twin = residual
    path = quantize_int8(
        twin, tmp_path / "q.onnx", split(), QuantizeConfig(keep_float=(LAYERS[0], LAYERS[2]))
    ).model.path
    weights = float_weights(twin.path, path)
    assert weights == ("network.one.weight", "network.three.weight")
    found = fake_quantise(model, split(), float_weights=weights)
    for name, layer in found.network.named_children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            same = torch.equal(layer.weight, model.network.get_parameter(f"{name}.weight"))
            assert same == (name in ("one", "three")) == (not layer._forward_pre_hooks), name


def test_between_float_by_hand() -> None:
    """image - pad - A - relu - B - add(relu) - pool - C - tail: with A and B float, all up to the addition."""
    nodes = [
        helper.make_node("Pad", ["image"], ["padded"], "pad"),
        helper.make_node("Conv", ["padded", "w"], ["a"], "A"),
        helper.make_node("Relu", ["a"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "w"], ["b"], "B"),
        helper.make_node("Add", ["b", "r"], ["sum"], "add"),
        helper.make_node("MaxPool", ["sum"], ["pooled"], "pool", kernel_shape=[2, 2]),
        helper.make_node("Conv", ["pooled", "w"], ["c"], "C"),
        helper.make_node("Sigmoid", ["c"], ["logits"], "tail"),
    ]
    value = helper.make_tensor_value_info("image", TensorProto.FLOAT, None)
    out = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    model = helper.make_model(helper.make_graph(nodes, "g", [value], [out]))
    assert between_float(model, ()) == ()
    assert between_float(model, {"A"}) == ("pad", "relu")
    assert between_float(model, {"A", "B"}) == ("pad", "relu", "add", "pool")
    assert between_float(model, {"B"}) == ()
    assert between_float(model, {"C"}) == ("add", "pool", "tail")
    assert between_float(model, {"B", "C"}) == ("add", "pool", "tail"), "the relu is fused into A"
    assert between_float(model, {"B", "C"}, {"B"}) == ("relu", "add", "pool", "tail")
    assert [layer.name for layer in layer_precision(model)] == ["A", "B", "C"]


def chain() -> TorchModel:
    """A convolution, a ReLU, and linear layers behind a reshaping."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 4)]
    return wrap(nn.Sequential(*layers), (3, 8, 8), CIFAR)


@pytest.mark.parametrize("kept", [("node_linear",), ("node_linear_1",), ("node_linear", "node_linear_1")])
def test_a_relu_is_fused_into_the_integer_layer_before_it_whatever_follows(
    kept: tuple[str, ...], tmp_path: Path
) -> None:
    """What is rounded are its results, all of them above 0: half the range, so half the step."""
    twin = export_onnx(chain(), tmp_path / "float.onnx", ExportConfig())
    path = quantize_int8(twin, tmp_path / "q.onnx", split(), QuantizeConfig(keep_float=kept)).model.path
    graph = onnx.load(path).graph
    zero_points = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    quantisers = [node for node in graph.node if node.op_type == "QuantizeLinear" and "image" not in node.input[0]]
    assert quantisers and all(int(zero_points[node.input[2]].ravel()[0]) == 0 for node in quantisers)
    assert operators(path)["Relu"] == len({"node_linear"} & set(kept)), "of the float layer alone"


@pytest.mark.parametrize("kept", ["node_linear", "node_linear_1", "node_conv2d"])
def test_a_layer_in_float_takes_error_away(kept: str, tmp_path: Path) -> None:
    """ONNX Runtime would round a float layer between integers itself, with one scale for all, a reshaping or not."""
    model = chain()
    with torch.no_grad():  # so that one scale for all is seen
        layers = model.network
        assert isinstance(layers, nn.Sequential) and isinstance(layers[3], nn.Linear)
        layers[3].weight *= torch.logspace(-2, 0, 16).view(-1, 1)
        assert isinstance(layers[5], nn.Linear)
        layers[5].weight /= torch.logspace(-2, 0, 16).view(1, -1)
    twin = export_onnx(model, tmp_path / "float.onnx", ExportConfig())
    images = split().take(np.arange(64, dtype=np.int64)).images
    truth = OnnxPredictor(twin.path).predict(images)

    def error(*names: str, optimized: bool = True) -> float:
        config = QuantizeConfig(keep_float=names, equalize=False, reduce_range=True)
        path = quantize_int8(twin, tmp_path / "q.onnx", split(), config).model.path
        found = OnnxPredictor(path, optimized=optimized).predict(images)
        return float((found - truth).square().mean())

    assert error(kept) < 1.1 * error()
    assert error(kept) == pytest.approx(error(kept, optimized=False), rel=0.1)
