from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import helper
from torch import Tensor, nn

from toolkit.config import ExportConfig
from toolkit.errors import ToolkitError
from toolkit.exporters import onnx as exporter
from toolkit.exporters.onnx import export_onnx, load_onnx, read_metadata, save_onnx, write_metadata
from toolkit.exporters.rewrites import rewrite
from toolkit.exporters.session import OnnxPredictor
from toolkit.models.networks import cnn8, resnet18

from .small import lively, onnx_file, tiny, wrap

LEAKS = re.compile(rb"/[a-z]+/[\w.-]+/|\.py\b|File \"|self\.|return |site-packages|forward\(|nn\.modules|aten")
"""Absolute paths, source lines, the exporter's stack traces and module records."""


class Pooled(nn.Module):
    """A network whose spatial mean is written as people write it."""

    def __init__(self, *, keepdim: bool) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3)
        self.linear = nn.Linear(5, 3)
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.convolution(x).mean((-2, -1), keepdim=self.keepdim)
        logits: Tensor = self.linear(pooled.flatten(1))
        return logits


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x * 2
        return x.flatten(1)[:, :3]


class Exotic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values: Tensor = torch.special.bessel_j0(x)
        return values.flatten(1)[:, :3]


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "cnn8": (cnn8, (1, 28, 28)),
    "resnet18": (resnet18, (3, 32, 32)),
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=10), (3, 64, 64)),
    "vision transformer": (
        lambda: torchvision.models.VisionTransformer(32, 16, 1, 2, 32, 64, num_classes=10),
        (3, 32, 32),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_is_right_and_holds_no_path_and_no_source_line(name: str, tmp_path: Path) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    images = torch.rand(6, *shape)
    model = lively(wrap(build(), shape), images)
    path = export_onnx(model, tmp_path / "m.onnx", ExportConfig(), metadata={"classes": "a b c"}).path
    found = LEAKS.search(path.read_bytes())
    assert found is None, path.read_bytes()[max(0, found.start() - 80) : found.end() + 80]
    assert str(tmp_path).encode() not in path.read_bytes()
    proto = onnx.load(path)
    assert [value.name for value in proto.graph.input] == ["image"]
    assert [value.name for value in proto.graph.output] == ["logits"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert proto.opset_import[0].version == 20
    assert "ReduceMean" not in {node.op_type for node in proto.graph.node}
    assert read_metadata(path) == {"classes": "a b c"}
    for count in (1, 5):
        difference = OnnxPredictor(path).predict(images[:count]) - model.predict(images[:count])
        assert difference.abs().max() < 1e-4


def test_the_model_is_exported_in_evaluation_mode_and_left_as_it_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Flatten(), nn.Linear(144, 3))
    model = wrap(network, (1, 8, 8))
    model.module.train()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    path = export_onnx(model, tmp_path / "m.onnx", ExportConfig()).path
    assert model.module.training
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
    images = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(OnnxPredictor(path).predict(images), model.predict(images))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("keepdim", [True, False])
def test_spatial_means_become_global_pools(keepdim: bool, tmp_path: Path) -> None:
    model = wrap(Pooled(keepdim=keepdim), (3, 8, 9))
    path = export_onnx(model, tmp_path / "m.onnx", ExportConfig()).path
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert "GlobalAveragePool" in operators
    assert "ReduceMean" not in operators
    images = torch.rand(3, 3, 8, 9)
    torch.testing.assert_close(OnnxPredictor(path).predict(images), model.predict(images))


def test_means_over_other_axes_stay(tmp_path: Path) -> None:
    nodes = [helper.make_node("ReduceMean", ["image", "axes"], ["logits"], keepdims=0)]
    path = onnx_file(tmp_path / "m.onnx", nodes, ["N", 3, 4, 4], axes=np.array([1, 2]))
    assert [node.op_type for node in rewrite(load_onnx(path)).graph.node] == ["ReduceMean"]


@pytest.mark.parametrize(
    ("network", "problem", "found"),
    [
        (Branching(), "cannot handle", "if x.sum() > 0"),
        (nn.Sequential(nn.Identity(), Exotic()), "cannot handle", "bessel_j0"),
        (nn.Sequential(nn.Identity(), Exotic()), "cannot handle", "module 'network.1' (Exotic)"),
        (FixedBatch(), "fixed batch size", "N"),
    ],
)
def test_networks_that_cannot_be_exported_are_refused_by_name(
    network: nn.Module, problem: str, found: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ToolkitError, match=problem) as caught:
        export_onnx(wrap(network, (1, 4, 4)), tmp_path / "m.onnx", ExportConfig())
    assert found in caught.value.found
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_metadata_are_added_to_those_already_there(tmp_path: Path) -> None:
    path = export_onnx(wrap(tiny(), (1, 8, 8)), tmp_path / "m.onnx", ExportConfig(), metadata={"a": "1"}).path
    write_metadata(path, {"b": "2", "a": "3"})
    assert read_metadata(path) == {"a": "3", "b": "2"}


def test_equal_models_give_equal_files(tmp_path: Path) -> None:
    model = wrap(tiny(), (1, 8, 8))
    files = [export_onnx(model, tmp_path / name, ExportConfig()).path.read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has exported nothing yet."""
    monkeypatch.setattr("toolkit.exporters.onnx._converted", {})


@pytest.mark.usefixtures("nothing_kept")
def test_equal_programs_are_converted_once_and_others_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    convert = exporter._convert_anew

    def counted(program: torch.export.ExportedProgram, opset: int) -> onnx.ModelProto:
        made.append(opset)
        return convert(program, opset)

    monkeypatch.setattr(exporter, "_convert_anew", counted)

    def export(network: nn.Module, opset: int = 20) -> bytes:
        return export_onnx(wrap(network, (1, 8, 8)), tmp_path / "m.onnx", ExportConfig(opset=opset)).path.read_bytes()

    network = tiny()
    first = export(network)
    load_onnx(tmp_path / "m.onnx").graph.node.pop()  # what is done with a graph does not reach what is kept
    assert export(network) == first and made == [20]
    assert export(network, opset=21) != first and made == [20, 21]
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] += 1e-6
    changed = export(network)
    assert changed != first and made == [20, 21, 20], "one weight"
    body = tiny()
    assert isinstance(body, nn.Sequential)
    other = nn.Sequential(*body, nn.Tanh())
    other.load_state_dict(network.state_dict())
    assert export(other) != changed and len(made) == 4, "the same weights in other code"
    assert [export(network), len(made)] == [changed, 4]


@pytest.mark.usefixtures("nothing_kept")
def test_no_more_graphs_are_kept_than_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = [wrap(tiny(), (1, 8, 8)) for _ in range(3)]
    for number, network in enumerate(networks):
        next(network.network.parameters()).data.fill_(number)
    files = [export_onnx(network, tmp_path / "m.onnx", ExportConfig()).path.read_bytes() for network in networks]
    size = max(map(len, exporter._converted.values()))
    for kept, room in ((2, 2 * size), (0, size - 1)):
        exporter._converted.clear()
        monkeypatch.setattr(exporter, "KEPT_BYTES", room)
        again = [export_onnx(network, tmp_path / "m.onnx", ExportConfig()).path.read_bytes() for network in networks]
        assert again == files and len(exporter._converted) == kept


@pytest.mark.usefixtures("nothing_kept")
def test_torchs_table_of_operators_is_built_once_for_each_operator_set_and_changes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    build = vars(ONNXRegistry)["from_torchlib"].__func__
    built: list[int] = []

    def counted(kind: type, opset_version: int) -> object:
        built.append(opset_version)
        return build(kind, opset_version=opset_version)

    watched: Any = classmethod(counted)
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", watched)
    model = wrap(tiny(), (1, 8, 8))

    def export(name: str, opset: int = 20) -> bytes:
        exporter._converted.clear()
        file = export_onnx(model, tmp_path / name, ExportConfig(opset=opset)).path.read_bytes()
        assert vars(ONNXRegistry)["from_torchlib"] is watched, "as it was"
        return file

    first, other, again = export("a"), export("b", opset=21), export("c")
    assert built == [20, 21] and first == again != other
    monkeypatch.setattr("toolkit.exporters.onnx._one_registry", contextlib.nullcontext)
    assert export("d") == first and built == [20, 21, 20]


@pytest.mark.parametrize("content", [None, b"hello", b""])
def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ToolkitError, match=r"cannot be read|holds no network"):
        load_onnx(path)


def test_a_network_beyond_the_limit_of_the_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.exporters.onnx.PROTOBUF_LIMIT", 10)
    proto = load_onnx(export_path(tmp_path))
    with pytest.raises(ToolkitError, match="too large"):
        save_onnx(proto, tmp_path / "large.onnx")


def export_path(folder: Path) -> Path:
    return onnx_file(folder / "s.onnx", [helper.make_node("Flatten", ["image"], ["logits"])], ["N", 1, 2, 2])
