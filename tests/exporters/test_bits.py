from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from toolkit.artifacts import OnnxModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.cost import integer_coverage
from toolkit.evaluators.fake_quantised import fake_quantise
from toolkit.evaluators.surrogate import build_twin
from toolkit.exporters.admission import refuse_bits
from toolkit.exporters.four_bits import four_bit_layers, pack_four_bits
from toolkit.exporters.onnx import export_onnx, load_onnx
from toolkit.exporters.precision import layer_precision, precision_faults
from toolkit.exporters.quantize import Quantizer, quantize_int8
from toolkit.exporters.session import OnnxPredictor, make_session

from .conftest import Trained
from .small import onnx_file, pictures, wrap


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    """One convolution, two linear layers with a ReLU between them, 8x8 images of one channel."""
    torch.manual_seed(3)
    layers = (nn.Conv2d(1, 4, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
    model = wrap(nn.Sequential(*layers, nn.Linear(32, 3)), (1, 8, 8))
    return export_onnx(model, tmp_path_factory.mktemp("network") / "float.onnx", ExportConfig())


def test_linear_layers_are_int4_and_multiplied_as_integers(network: OnnxModel, tmp_path: Path) -> None:
    split = pictures(64, (1, 8, 8))
    made = quantize_int8(network, tmp_path / "m.onnx", split, QuantizeConfig(weight_bits=4))
    assert [layer.precision for layer in made.layers] == ["int8", "int4", "int4"]
    assert made.weights(8) == "int8 symmetric per channel; of linear layers int4 symmetric per channel"
    coverage = integer_coverage(made.model.path)
    assert [(row.kernel, row.integer) for row in coverage.layers] == [
        ("QLinearConv", True),
        ("MatMulNBits", True),
        ("MatMulNBits", True),
    ]
    assert coverage.share == 1
    stored = load_onnx(made.model.path)
    kinds = Counter(item.data_type for item in stored.graph.initializer if len(item.dims) == 2)
    assert kinds == {TensorProto.INT4: 2}
    onnx.checker.check_model(stored, full_check=True)


def test_the_kernel_of_int4_weights_rounds_what_it_reads_to_int8(tmp_path: Path) -> None:
    """A block whose largest value is 1 loses 0.003, less than half of 1/127: a float kernel would not."""
    node = helper.make_node("MatMul", ["image", "w"], ["logits"], "layer")
    path = onnx_file(tmp_path / "m.onnx", [node], ["N", 32], w=np.full((32, 2), 0.7, np.float32))
    onnx.save(pack_four_bits(load_onnx(path), ["layer"]), path)
    values = np.full((1, 32), 0.003, np.float32)
    values[0, 0] = 1
    (found,) = make_session(path).run(None, {"image": values})
    (unfused,) = make_session(path, optimized=False).run(None, {"image": values})
    assert found == pytest.approx(0.7, abs=2e-3)
    assert unfused == pytest.approx(0.7 * (1 + 31 * 0.003), abs=1e-5)
    assert integer_coverage(path).share == 1


def test_int4_weights_are_the_nearest_of_fifteen(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    node = helper.make_node("Gemm", ["image", "w", "b"], ["logits"], "layer", transB=1)
    path = onnx_file(tmp_path / "m.onnx", [node], ["N", 20], w=weights, b=np.arange(3, dtype=np.float32))
    packed = pack_four_bits(load_onnx(path), ["layer"])
    constants = {item.name: numpy_helper.to_array(item) for item in packed.graph.initializer}
    rounded, scale = constants["layer_weight_int4"], constants["layer_weight_scale"]
    assert rounded.dtype.name == "int4" and "w" not in constants
    assert np.allclose(scale, np.abs(weights).max(1) / 7)
    error = np.abs(rounded.astype(np.float32) * scale - weights.T)
    assert (error <= scale / 2 + 1e-6).all()
    onnx.save(packed, path)
    images = np.random.default_rng(1).normal(size=(4, 20)).astype(np.float32)
    (found,) = make_session(path, optimized=False).run(None, {"image": images})
    assert np.allclose(found, images @ (rounded.astype(np.float32) * scale) + np.arange(3), atol=1e-4)


def test_products_of_activations_and_odd_layers_have_no_int4_weights(tmp_path: Path) -> None:
    flat = helper.make_node("Flatten", ["image"], ["x"], "flat")
    nodes = [
        flat,
        helper.make_node("Gemm", ["x", "w"], ["y"], "scaled", alpha=0.5),
        helper.make_node("MatMul", ["y", "y"], ["z"], "square"),
        helper.make_node("MatMul", ["z", "v"], ["logits"], "plain"),
    ]
    path = onnx_file(tmp_path / "m.onnx", nodes, [3, 3], w=np.eye(3, dtype=np.float32), v=np.eye(3, dtype=np.float32))
    assert four_bit_layers(load_onnx(path)) == ("plain",)


def test_layers_that_stay_float_are_not_int4(network: OnnxModel, tmp_path: Path) -> None:
    quantizer = Quantizer(network, pictures(32, (1, 8, 8)), QuantizeConfig(weight_bits=4))
    made = quantizer.write(tmp_path / "m.onnx", keep_float=["node_linear"])
    assert [layer.precision for layer in made.layers] == ["int8", "float32", "int4"]
    assert [row.kernel for row in integer_coverage(made.model.path).layers] == [
        "QLinearConv",
        "FusedGemm",
        "MatMulNBits",
    ]


def test_16_bit_activations_are_stored_and_computed_in_float(trained: Trained, tmp_path: Path) -> None:
    paths = {}
    for bits in (8, 16):
        config = QuantizeConfig(activation_bits=bits, equalize=False)  # the simulation rounds weights as they are
        made = quantize_int8(trained.twin, tmp_path / f"{bits}.onnx", trained.calibration, config)
        paths[bits] = made.model.path
        assert made.activation_bits == bits and made.input_range is not None
        assert made.input_range[0] <= 0 and made.input_range[1] >= 1
    graph = load_onnx(paths[16]).graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    quantisers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert quantisers and {constants[node.input[2]].dtype for node in quantisers} == {np.dtype("uint16")}
    coverage = integer_coverage(paths[16])
    assert coverage.share == 0 and {row.kernel for row in coverage.layers} == {"Conv", "Gemm"}
    images = trained.evaluation.take(np.arange(400, dtype=np.int64)).images
    simulated = fake_quantise(trained.model, trained.calibration, activation_bits=16).predict(images)
    errors = {
        bits: float((OnnxPredictor(path).predict(images) - simulated).square().mean()) for bits, path in paths.items()
    }
    assert errors[16] < 1e-6 * float(simulated.var()) < errors[8]  # the simulation is the graph; eight bits are not


@pytest.mark.parametrize(
    ("config", "problem", "fix"),
    [
        ({"activation_bits": 4}, "--activation-bits names a precision", "choose 8 or 16; other precisions"),
        ({"activation_bits": 4}, "--activation-bits", "toolkit simulate MODEL --bits 8/4"),
        ({"weight_bits": 2}, "--weight-bits names a precision", "toolkit simulate MODEL --bits 2/8"),
        ({"weight_bits": 16}, "--weight-bits", "choose 4 or 8"),
        ({"activation_bits": 16, "calibrate": "mse"}, "--calibrate mse", "minmax, moving-average or percentile"),
        ({"activation_bits": 16, "calibrate": "entropy"}, "--calibrate entropy", "minmax"),
        ({"activation_bits": 16, "reduce_range": True}, "--reduce-range saves", "leave one of the two flags away"),
    ],
)
def test_what_onnx_runtime_does_not_run_is_refused(config: dict[str, Any], problem: str, fix: str) -> None:
    with pytest.raises(ToolkitError) as caught:
        refuse_bits(QuantizeConfig(**config))
    assert problem in caught.value.problem and fix in caught.value.fix


def test_the_refusal_comes_before_the_work(network: OnnxModel) -> None:
    with pytest.raises(ToolkitError, match="ONNX Runtime has no graph for"):
        Quantizer(network, pictures(4, (1, 8, 8)), QuantizeConfig(weight_bits=1))


def test_methods_that_suit_256_levels_are_left_out_of_auto(network: OnnxModel) -> None:
    config = QuantizeConfig(activation_bits=16, calibrate="auto")
    assert Quantizer(network, pictures(8, (1, 8, 8)), config).methods == ("minmax", "moving-average", "percentile")


def test_faults_know_the_bits_that_were_asked_for(network: OnnxModel, tmp_path: Path) -> None:
    split = pictures(16, (1, 8, 8))
    path = quantize_int8(network, tmp_path / "m.onnx", split, QuantizeConfig(weight_bits=4)).model.path
    linear = ["node_linear", "node_linear_1"]
    assert precision_faults(load_onnx(path), four_bit=linear) == ()
    assert precision_faults(load_onnx(path))[0] == "node_linear: weights are int4, not int8"
    assert "activations are uint8, not uint16" in precision_faults(load_onnx(path), activations="uint16")[0]
    plain = quantize_int8(network, tmp_path / "p.onnx", split, QuantizeConfig()).model.path
    assert precision_faults(load_onnx(plain), four_bit=linear)[0] == "node_linear: weights are int8, not int4"


def test_a_graph_of_int4_alone_says_so(tmp_path: Path) -> None:
    model = wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)), (1, 8, 8))
    twin = export_onnx(model, tmp_path / "float.onnx", ExportConfig())
    made = quantize_int8(twin, tmp_path / "m.onnx", pictures(16, (1, 8, 8)), QuantizeConfig(weight_bits=4))
    assert made.weights(8) == "int4 symmetric per channel" and integer_coverage(made.model.path).share == 1
    assert {layer.precision for layer in layer_precision(load_onnx(made.model.path))} == {"int4"}


def test_the_twin_of_16_bit_activations_looks_at_no_ties(
    network: OnnxModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nearly every value lies near one, so that each would be summed again as the float kernel does."""
    made = quantize_int8(network, tmp_path / "m.onnx", pictures(32, (1, 8, 8)), QuantizeConfig(activation_bits=16))
    monkeypatch.setattr("toolkit.evaluators.twin.quantised.settle_ties", lambda *_, **__: pytest.fail("a tie settled"))
    images = pictures(32, (1, 8, 8), seed=1).take(np.arange(32, dtype=np.int64)).images
    wanted = OnnxPredictor(made.model.path).predict(images)
    found = build_twin(made.model.path).predict(images)
    assert float((found - wanted).abs().max()) < 1e-3 * float(wanted.std())
