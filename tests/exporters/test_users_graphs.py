"""Integer and half graphs of networks that end, compute or are written in unusual ways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from toolkit.artifacts import OnnxModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.half import write_half
from toolkit.exporters.onnx import export_onnx, load_onnx
from toolkit.exporters.parity import measure_parity
from toolkit.exporters.quantize import Quantizer, quantize_int8
from toolkit.exporters.session import OnnxPredictor

from .small import onnx_file, pictures, wrap

IMAGES = pictures(48, (1, 8, 8))


def exported(network: nn.Module, folder: Path, opset: int = 20) -> OnnxModel:
    return export_onnx(wrap(network, (1, 8, 8)), folder / "float.onnx", ExportConfig(opset=opset))


def off_by(twin: OnnxModel, integers: Path) -> float:
    """The largest difference of any logit, in standard deviations of all logits."""
    images = IMAGES.take(np.arange(len(IMAGES), dtype=np.int64)).images
    wanted, found = (OnnxPredictor(path).predict(images) for path in (twin.path, integers))
    return float((found - wanted).abs().max() / wanted.std())


def ending(*tail: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 12), *tail)


@pytest.mark.parametrize(
    ("tail", "least", "most"),
    [
        ([nn.ReLU()], 0.0, np.inf),
        ([nn.Hardtanh(-0.125, 0.125)], -0.125, 0.125),
        ([nn.ReLU(), nn.Unflatten(1, (3, 4)), nn.AvgPool1d(4), nn.Flatten()], 0.0, np.inf),
    ],
)
def test_what_cuts_off_the_logits_is_in_the_integer_graph_too(
    tail: list[nn.Module], least: float, most: float, tmp_path: Path
) -> None:
    twin = exported(ending(*tail), tmp_path)
    made = quantize_int8(twin, tmp_path / "m.onnx", IMAGES, QuantizeConfig())
    logits = OnnxPredictor(made.model.path).predict(IMAGES.take(np.arange(48, dtype=np.int64)).images)
    assert least <= float(logits.min()) and float(logits.max()) <= most
    assert off_by(twin, made.model.path) < 0.2


class Attention(nn.Module):
    """One head, so that a part of the common projection stands right before the product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.common, self.out, self.last = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def factors(self, x: Tensor) -> tuple[Tensor, ...]:
        together: Tensor = self.common(x[:, 0])
        return together.chunk(3, -1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.factors(x)
        seen = torch.softmax(query @ key.transpose(1, 2), -1) @ value
        logits: Tensor = self.last(self.out(seen).mean(1))
        return logits


def test_attention_of_one_head_may_stay_float(tmp_path: Path) -> None:
    """Its second factor is an activation, whose dequantiser is no sign of integer weights."""
    twin = exported(Attention(), tmp_path)
    quantizer = Quantizer(twin, IMAGES, QuantizeConfig())
    names = [layer.name for layer in quantizer.write(tmp_path / "whole.onnx").layers]
    assert len(names) == 5
    for name in names:
        made = quantizer.write(tmp_path / "m.onnx", keep_float=(name,))
        assert next(layer.precision for layer in made.layers if layer.name == name) == "float32"
        assert off_by(twin, made.model.path) < 0.5


class Scaled(nn.Module):
    """Multiplies by numbers that are no tensors of one axis, and clips between such."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.last = nn.Conv2d(1, 4, 3, stride=2), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        logits: Tensor = self.last((y * functional.relu6(y + 3) / 6).flatten(1))
        return logits


def test_numbers_without_axes_are_no_obstacle_to_half_precision(tmp_path: Path) -> None:
    twin = exported(Scaled(), tmp_path)
    assert write_half(twin.path, tmp_path / "half.onnx", IMAGES) > 0
    assert off_by(twin, tmp_path / "half.onnx") < 0.02
    quantize_int8(twin, tmp_path / "m.onnx", IMAGES, QuantizeConfig())
    assert off_by(twin, tmp_path / "m.onnx") < 0.2


def as_before_ir_4(source: Path, target: Path, *, image_first: bool) -> ModelProto:
    """List the constants among the inputs, as such files did."""
    made = onnx.load(source)
    listed = [helper.make_tensor_value_info(item.name, item.data_type, item.dims) for item in made.graph.initializer]
    inputs = [*made.graph.input, *listed] if image_first else [*listed, *made.graph.input]
    del made.graph.input[:]
    made.graph.input.extend(inputs)
    made.ir_version = 3
    onnx.save(made, target)
    return made


@pytest.mark.parametrize("image_first", [True, False])
def test_files_that_list_constants_as_inputs_are_quantised(image_first: bool, tmp_path: Path) -> None:
    twin = exported(ending(), tmp_path)
    old = OnnxModel(tmp_path / "old.onnx", "fp32")
    as_before_ir_4(twin.path, old.path, image_first=image_first)
    made = quantize_int8(old, tmp_path / "m.onnx", IMAGES, QuantizeConfig())
    assert len(load_onnx(made.model.path).graph.input) == 1
    wanted = quantize_int8(twin, tmp_path / "n.onnx", IMAGES, QuantizeConfig())
    images = IMAGES.take(np.arange(9, dtype=np.int64)).images
    found = [OnnxPredictor(one.model.path).predict(images) for one in (made, wanted)]
    assert torch.equal(found[0], found[1])
    write_half(old.path, tmp_path / "half.onnx", IMAGES)
    assert off_by(twin, tmp_path / "half.onnx") < 0.02


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 2.0), (3.0, 1.0), (1.0, -1.0), (2.0, 0.0)])
def test_the_factors_of_a_gemm_are_kept(alpha: float, beta: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.normal(0, 0.3, size).astype(np.float32) for size in ((64, 16), (16, 3)))
    bias = [rng.normal(0, 1, size).astype(np.float32) for size in (16, 3)]
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "a", "b"], ["hidden"], "first", alpha=alpha, beta=beta),
        helper.make_node("Relu", ["hidden"], ["bent"], "relu"),
        helper.make_node("Gemm", ["bent", "c", "d"], ["logits"], "second", alpha=alpha, beta=beta),
    ]
    path = onnx_file(tmp_path / "float.onnx", nodes, ["N", 1, 8, 8], a=first, b=bias[0], c=second, d=bias[1])
    twin = OnnxModel(path, "fp32")
    made = quantize_int8(twin, tmp_path / "m.onnx", IMAGES, QuantizeConfig())
    assert {layer.precision for layer in made.layers} == {"int8"}
    parity = measure_parity(OnnxPredictor(path), OnnxPredictor(made.model.path), IMAGES)
    assert parity.agreement.value > 0.9 and off_by(twin, made.model.path) < 0.2


def test_a_graph_that_cannot_be_prepared_is_bad_input(tmp_path: Path) -> None:
    """Opset 23 has an attention of its own, which ONNX Runtime's shape inference takes for another."""

    class Fused(Attention):
        def forward(self, x: Tensor) -> Tensor:
            query, key, value = (factor.unsqueeze(1) for factor in self.factors(x))
            logits: Tensor = self.last(functional.scaled_dot_product_attention(query, key, value)[:, 0].mean(1))
            return logits

    late = exported(Fused(), tmp_path, opset=23)
    assert any(node.op_type == "Attention" for node in load_onnx(late.path).graph.node)
    with pytest.raises(ToolkitError, match="cannot prepare the graph") as caught:
        Quantizer(late, IMAGES, QuantizeConfig())
    assert "opset 23" in caught.value.found and "Attention" in caught.value.found and "--opset 20" in caught.value.fix
    early = exported(Fused(), tmp_path)
    assert off_by(early, quantize_int8(early, tmp_path / "m.onnx", IMAGES, QuantizeConfig()).model.path) < 0.5


def test_operators_of_onnx_runtime_alone_make_no_file_for_tensorrt(tmp_path: Path) -> None:
    twin = exported(ending(), tmp_path)
    made = load_onnx(twin.path)
    logits = made.graph.node[-1].output[0]
    made.graph.node[-1].output[0] = "before"
    made.graph.node.append(helper.make_node("Gelu", ["before"], [logits], "gelu", domain="com.microsoft"))
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(made, twin.path)
    quantizer = Quantizer(twin, IMAGES, QuantizeConfig())
    with pytest.raises(ToolkitError, match="no file for TensorRT") as caught:
        quantizer.write_tensorrt(tmp_path / "trt.onnx")
    assert "com.microsoft" in caught.value.found


def test_a_constant_of_two_products_is_scaled_for_the_one_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    square = rng.normal(0, 0.2, (64, 64)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "w"], ["one"], "one", alpha=2.0),
        helper.make_node("Gemm", ["one", "w"], ["two"], "two"),
        helper.make_node("Gemm", ["two", "v"], ["logits"], "three"),
    ]
    narrow = rng.normal(0, 0.2, (64, 3)).astype(np.float32)
    path = onnx_file(tmp_path / "float.onnx", nodes, ["N", 1, 8, 8], w=square, v=narrow)
    made = quantize_int8(OnnxModel(path, "fp32"), tmp_path / "m.onnx", IMAGES, QuantizeConfig())
    assert off_by(OnnxModel(path, "fp32"), made.model.path) < 0.3
    kinds = {item.data_type for item in load_onnx(made.model.path).graph.initializer if item.dims == [64, 64]}
    assert kinds == {TensorProto.INT8}
    assert numpy_helper.to_array(load_onnx(path).graph.initializer[0]).dtype == np.float32, "the file stays as it is"
