from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from tests.toys import GREY, halves, small_network, wrap
from toolkit.artifacts import TorchModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.exporters.given_ranges import ranges_by_tensor
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import Quantizer

IMAGES = halves(40)


@pytest.fixture
def model() -> TorchModel:
    torch.manual_seed(0)
    return wrap(small_network(batch_norm=True), classes=2, shape=(1, 8, 8), normalization=GREY)


def test_tensors_are_found_by_their_values(model: TorchModel, tmp_path: Path) -> None:
    fp32 = export_onnx(model, tmp_path / "float.onnx", ExportConfig())
    images = IMAGES.take(np.arange(3)).images
    with torch.no_grad():
        rectified = nn.Sequential(*list(model.network.children())[:3])((images - 0.5) / 0.5)
    values = {"relu": rectified, "elsewhere": torch.rand_like(rectified), "nothing": torch.zeros_like(rectified)}
    found = ranges_by_tensor(fp32.path, images, values, dict.fromkeys(values, (0.0, 1.0)) | {"relu": (0.0, 7.0)})
    graph = onnx.load(fp32.path).graph
    (relu,) = [node.output[0] for node in graph.node if node.op_type == "Relu"]
    (flat,) = [node.output[0] for node in graph.node if node.op_type in ("Reshape", "Flatten")]
    assert found == {relu: (0.0, 7.0), flat: (0.0, 7.0)}


def test_given_ranges_stand_in_the_graph_and_others_are_calibrated(model: TorchModel, tmp_path: Path) -> None:
    fp32 = export_onnx(model, tmp_path / "float.onnx", ExportConfig())
    (relu,) = [node.output[0] for node in onnx.load(fp32.path).graph.node if node.op_type == "Relu"]
    scales = []
    for given in ({}, {relu: (0.0, 51.0), "no tensor of this graph": (0.0, 1.0)}):
        made = Quantizer(fp32, IMAGES, QuantizeConfig(), ranges=given).write(tmp_path / "int8.onnx")
        graph = onnx.load(made.model.path).graph
        constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
        scales.append(
            {node.input[0]: float(constants[node.input[1]]) for node in graph.node if node.op_type == "QuantizeLinear"}
        )
        assert made.learnt_ranges == bool(given)
    calibrated, learnt = scales
    changed = {name for name in learnt if learnt[name] != calibrated[name]}
    assert changed and all(learnt[name] == pytest.approx(0.2) for name in changed)
    assert "image" in set(learnt) - changed
