from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from toolkit import progress
from toolkit.artifacts import OnnxModel, TorchModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.parity import measure_parity
from toolkit.exporters.quantize import quantize_int8
from toolkit.exporters.ranges import METHODS
from toolkit.exporters.session import OnnxPredictor

from .small import pictures, wrap


def network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 16, 3),
    )  # fmt: skip


def dead(layers: Any) -> None:
    """Two filters of zeros with a negative bias: what they give is 0 throughout."""
    layers[0].weight[1:3], layers[0].bias[1:3] = 0, -1


def biased(layers: Any) -> None:
    """A filter of zeros whose bias alone comes through."""
    layers[0].weight[1], layers[0].bias[1] = 0, 0.7


def faint(layers: Any) -> None:
    """A filter so faint that its bias is no int32 in units of its sums."""
    layers[0].weight[1] *= 1e-12
    layers[0].bias[1] = 0.7


def silent(layers: Any) -> None:
    """A whole layer that gives 0: its tensor has no range at all."""
    layers[0].weight[:], layers[0].bias[:] = 0, -1


def constant(layers: Any) -> None:
    """A whole layer that gives its biases."""
    layers[0].weight[:] = 0
    layers[0].bias[:] = torch.linspace(0.1, 0.8, 8)


def mute(layers: Any) -> None:
    """A class whose weights are 0."""
    layers[5].weight[2] = 0


CASES: dict[str, tuple[Callable[[Any], None], dict[str, int], str]] = {
    "dead": (dead, {"node_conv2d_1": 2}, "2 at 'node_conv2d_1'"),
    "biased": (biased, {"node_conv2d_1": 1}, "1 at 'node_conv2d_1'"),
    "faint": (faint, {}, ""),
    "silent": (silent, {"node_conv2d_1": 8}, "8 at 'node_conv2d_1'"),
    "constant": (constant, {"node_conv2d_1": 8}, "filters of zeros): 8 (8 at 'node_conv2d')"),
    "mute": (mute, {}, "filters of zeros): 1 (1 at 'node_linear')"),
}


@functools.cache
def _exported(case: str) -> tuple[TorchModel, bytes]:
    """The network of a case and its float twin; exporting takes long, so each is exported once."""
    layers = network()
    with torch.no_grad():
        CASES[case][0](layers)
    model = wrap(layers, (1, 8, 8))
    with tempfile.TemporaryDirectory() as folder:
        return model, export_onnx(model, Path(folder) / "f.onnx", ExportConfig()).path.read_bytes()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_channels_that_carry_nothing_leave_a_valid_graph(
    case: str, method: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, counted, said = CASES[case]
    model, content = _exported(case)
    split, twin = pictures(60, (1, 8, 8)), OnnxModel(tmp_path / "f.onnx", "fp32")
    twin.path.write_bytes(content)
    progress.set_quiet(False)
    made = quantize_int8(twin, tmp_path / "q.onnx", split, QuantizeConfig(calibrate=method))
    assert {name: count for name, count in made.constant_channels.items() if name in counted} == counted
    assert said in capsys.readouterr().err
    for item in onnx.load(made.model.path).graph.initializer:
        values = numpy_helper.to_array(item)
        assert np.isfinite(values).all()
        if item.name.endswith("_scale"):
            assert (values > 0).all(), item.name
    for optimized in (True, False):
        parity = measure_parity(model, OnnxPredictor(made.model.path, optimized=optimized), split)
        assert max(batch.max_difference for batch in parity.batches) < 0.02, (case, method, optimized)


def test_one_scale_for_all_filters_may_be_that_of_zeros(tmp_path: Path) -> None:
    """Per tensor, all filters of zeros: the biases alone decide what comes out."""
    model, content = _exported("constant")
    split, twin = pictures(60, (1, 8, 8)), OnnxModel(tmp_path / "f.onnx", "fp32")
    twin.path.write_bytes(content)
    made = quantize_int8(twin, tmp_path / "q.onnx", split, QuantizeConfig(per_channel=False))
    parity = measure_parity(model, OnnxPredictor(made.model.path), split)
    assert max(batch.max_difference for batch in parity.batches) < 0.02
