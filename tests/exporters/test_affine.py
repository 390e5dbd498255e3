from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn

from toolkit.artifacts import OnnxModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.exporters.affine import norms_to_convolutions
from toolkit.exporters.onnx import export_onnx, load_onnx
from toolkit.exporters.quantize import quantize_int8
from toolkit.exporters.session import OnnxPredictor

from .small import pictures, wrap

SHAPE = (3, 32, 32)


class Joined(nn.Module):
    """A norm behind a concatenation whose parts something else reads too; some factors vanish, or nearly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 3)
        with torch.no_grad():
            self.norm.weight.copy_(torch.linspace(-2, 2, 16))
            self.norm.weight[3], self.norm.weight[4] = 0.0, 1e-8
            self.norm.bias.normal_()
            assert self.norm.running_mean is not None and self.norm.running_var is not None
            self.norm.running_mean.normal_(0, 0.2)
            self.norm.running_var.uniform_(0.05, 0.5)

    def forward(self, image: Tensor) -> Tensor:
        one = torch.relu(self.first(image))
        both = torch.cat([one, torch.relu(self.second(one))], dim=1)
        logits: Tensor = self.head(torch.relu(self.last(torch.relu(self.norm(both)))).mean((2, 3)))
        return logits


def export(network: nn.Module, path: Path) -> tuple[Path, Tensor, Tensor]:
    """The float twin, images, and what torch answers."""
    model = wrap(network, SHAPE)
    images = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    return export_onnx(model, path, ExportConfig()).path, images, model.predict(images)


def test_a_norm_is_a_depthwise_convolution_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, images, expected = export(Joined(), tmp_path / "float.onnx")
    model = load_onnx(path)
    (norm,) = (node.name for node in model.graph.node if node.op_type == "BatchNormalization")
    kept = onnx.ModelProto()
    kept.CopyFrom(model)
    norms_to_convolutions(kept, keep=[norm])
    assert [node.op_type for node in kept.graph.node] == [node.op_type for node in model.graph.node]
    norms_to_convolutions(model)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert norm in {node.name for node in model.graph.node if node.op_type == "Conv"}
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "rewritten.onnx")
    torch.testing.assert_close(OnnxPredictor(tmp_path / "rewritten.onnx").predict(images), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("per_channel", [True, False])
def test_such_norms_run_in_integers(per_channel: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, images, expected = export(Joined(), tmp_path / "float.onnx")
    how = QuantizeConfig(int8=True, per_channel=per_channel)
    found = quantize_int8(OnnxModel(path, "fp32"), tmp_path / "int8.onnx", pictures(64, SHAPE), how)
    operators = Counter(node.op_type for node in load_onnx(tmp_path / "int8.onnx").graph.node)
    assert operators["BatchNormalization"] == (0 if per_channel else 1)
    assert all(layer.precision == "int8" for layer in found.layers)
    answers = OnnxPredictor(tmp_path / "int8.onnx").predict(images)
    assert float((answers - expected).square().mean() / expected.var()) < 0.02


def test_a_norm_between_float_layers_stays_what_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, *_ = export(Joined(), tmp_path / "float.onnx")
    names = [node.name for node in load_onnx(path).graph.node if node.op_type == "Conv"]
    how = QuantizeConfig(int8=True, keep_float=tuple(names[1:]))
    quantize_int8(OnnxModel(path, "fp32"), tmp_path / "int8.onnx", pictures(8, SHAPE), how)
    assert "BatchNormalization" in {node.op_type for node in load_onnx(tmp_path / "int8.onnx").graph.node}


def test_a_small_densenet_has_no_float_norm_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=3)
    with torch.no_grad():
        network.train()(torch.rand(16, *SHAPE))
    path, images, expected = export(network.eval(), tmp_path / "float.onnx")
    assert any(node.op_type == "BatchNormalization" for node in load_onnx(path).graph.node)
    quantize_int8(OnnxModel(path, "fp32"), tmp_path / "int8.onnx", pictures(32, SHAPE), QuantizeConfig(int8=True))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(tmp_path / "int8.onnx", options, providers=["CPUExecutionProvider"])
    left = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert left["BatchNormalization"] == left["Conv"] == left["FusedConv"] == 0 < left["QLinearConv"]
    answers = OnnxPredictor(tmp_path / "int8.onnx").predict(images)
    assert float((answers - expected).square().mean() / expected.var()) < 0.1
    assert np.isfinite(answers.numpy()).all()
