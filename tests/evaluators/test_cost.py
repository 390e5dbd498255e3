from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType, quantize_static
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from toolkit import progress
from toolkit.artifacts import (
    HashArray,
    Int64Array,
    ModelSpec,
    Normalization,
    Normalized,
    OnnxModel,
    Split,
    TorchModel,
    UInt8Array,
)
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.cost import integer_coverage, layer_macs, macs, parameters
from toolkit.exporters.calibration import CalibrationReader
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import quantize_int8
from toolkit.models.networks import cnn8, resnet18

CNN8_MACS = {
    "network.0": 28 * 28 * 32 * 9 * 1,
    "network.2": 14 * 14 * 32 * 9 * 32,
    "network.4": 14 * 14 * 64 * 9 * 32,
    "network.6": 7 * 7 * 64 * 9 * 64,
    "network.8": 7 * 7 * 128 * 9 * 64,
    "network.10": 4 * 4 * 128 * 9 * 128,
    "network.13": 2048 * 128,
    "network.15": 128 * 10,
}


@pytest.fixture(autouse=True)
def _no_progress() -> Iterator[None]:
    progress.set_quiet(True)
    yield
    progress.set_quiet(False)


@dataclass(frozen=True)
class Noise:
    """Random images."""

    shape: tuple[int, int, int]
    name: str = "noise"
    class_names: tuple[str, ...] = ("a", "b")

    @property
    def labels(self) -> Int64Array:
        return np.zeros(16, dtype=np.int64)

    @property
    def hashes(self) -> HashArray:
        return np.arange(16, dtype=np.uint64)

    def pixels(self, indices: Int64Array) -> UInt8Array:
        return np.random.default_rng(0).integers(0, 256, (len(indices), *self.shape), dtype=np.uint8)


def wrap(network: nn.Module, shape: tuple[int, int, int]) -> TorchModel:
    normalization = Normalization((0.5,) * shape[0], (0.5,) * shape[0])
    return TorchModel(Normalized(network, normalization), ModelSpec("test", ("a", "b"), shape, normalization))


def noise(shape: tuple[int, int, int]) -> Split:
    return Split(Noise(shape), np.arange(16, dtype=np.int64))


def narrow() -> nn.Module:
    """Widths that no block of 8 or 16 channels fits: nchwc kernels pad them."""
    return nn.Sequential(
        nn.Conv2d(3, 13, 3, padding=1), nn.ReLU(), nn.Conv2d(13, 27, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(27, 27, 3, padding=1), nn.ReLU(), nn.Conv2d(27, 19, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(19, 10),
    )  # fmt: skip


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.ReLU6(),
        nn.Conv2d(24, 36, 3, stride=2, groups=3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36 * 9, 10),
    )  # fmt: skip


def vision_transformer() -> nn.Module:
    network: nn.Module = torchvision.models.VisionTransformer(32, 16, 1, 2, 32, 64, num_classes=10)
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "cnn8": (cnn8, (1, 28, 28)),
    "resnet18": (resnet18, (3, 32, 32)),
    "narrow": (narrow, (3, 16, 16)),
    "grouped": (grouped, (3, 16, 16)),
}


def test_parameters_and_macs_of_cnn8_are_those_of_the_textbook() -> None:
    model = wrap(cnn8(), (1, 28, 28))
    assert parameters(model) == 549_994
    assert layer_macs(model) == CNN8_MACS
    assert macs(model) == sum(CNN8_MACS.values()) == 13_686_528


def test_attention_counts_its_projections_and_its_products() -> None:
    model = wrap(vision_transformer(), (3, 32, 32))
    tokens, width = 5, 32
    wanted = 4 * 3 * 16 * 16 * width  # patches
    wanted += tokens * width * 3 * width + 2 * tokens * tokens * width + tokens * width * width  # attention
    wanted += 2 * tokens * width * 64 + width * 10
    assert macs(model) == wanted
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_run_in_integers_and_no_mac_is_lost(name: str, tmp_path: Path) -> None:
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = wrap(build(), shape)
    twin = export_onnx(model, tmp_path / "float.onnx", ExportConfig())
    deployed = quantize_int8(twin, tmp_path / "int8.onnx", noise(shape), QuantizeConfig()).model
    whole, none = integer_coverage(deployed.path), integer_coverage(twin.path)
    assert whole.macs_total == none.macs_total == macs(model)
    assert (whole.share, none.share) == (1.0, 0.0)
    assert {layer.kernel for layer in whole.layers} <= {"QLinearConv", "QGemm"}
    assert {layer.kernel for layer in none.layers} <= {"Conv", "FusedConv", "Gemm", "FusedGemm"}
    assert none.kernel_time_share_integer == 0
    assert whole.kernel_time_share_integer > 0.5
    assert whole.leftovers["DequantizeLinear"] == 0
    assert whole.leftovers["QuantizeLinear"] == 1
    assert none.islands
    assert len(whole.layers) == len({layer.layer for layer in whole.layers}) == len(none.layers)


def test_layers_that_stay_float_are_not_counted_as_integers(tmp_path: Path) -> None:
    twin = export_onnx(wrap(cnn8(), (1, 28, 28)), tmp_path / "float.onnx", ExportConfig())
    planted: dict[str, tuple[dict[str, Any], float]] = {
        "convolutions only": ({"op_types_to_quantize": ["Conv"], "activation_type": QuantType.QUInt8}, 263_424),
        "linear layers only": ({"op_types_to_quantize": ["Gemm"], "activation_type": QuantType.QUInt8}, 13_423_104),
    }
    for name, (options, float_macs) in planted.items():
        path = tmp_path / f"{name.replace(' ', '-')}.onnx"
        reader = CalibrationReader(noise((1, 28, 28)), "image")
        quantize_static(twin.path, path, reader, per_channel=True, weight_type=QuantType.QInt8, **options)
        coverage = integer_coverage(path)
        assert coverage.macs_total == 13_686_528
        assert coverage.macs_total - coverage.macs_integer == float_macs, name
        assert coverage.leftovers["DequantizeLinear"] > 0


def test_kernels_are_attributed_to_the_layers_of_the_file(tmp_path: Path) -> None:
    twin = export_onnx(wrap(cnn8(), (1, 28, 28)), tmp_path / "float.onnx", ExportConfig())
    rows = integer_coverage(twin.path).layers
    assert [row.macs for row in rows] == list(CNN8_MACS.values())
    assert [row.integer for row in rows] == [False] * 8
    assert all(row.kernel != "(none)" for row in rows)


def test_files_of_others_work_and_nameless_nodes_too(tmp_path: Path) -> None:
    weights = [helper.make_tensor(name, TensorProto.FLOAT, (4, 4), [0.1] * 16) for name in ("first", "second")]
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "first"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "second"], ["logits"]),
    ]
    path = save(tmp_path / "other.onnx", nodes, weights)
    coverage = integer_coverage(path)
    assert (coverage.macs_total, coverage.share, len(coverage.layers)) == (32, 0.0, 2)


@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.FLOAT16])
def test_files_that_take_other_types_are_profiled_on_them(kind: int, tmp_path: Path) -> None:
    weights = [helper.make_tensor("weights", TensorProto.FLOAT, (4, 4), [0.1] * 16)]
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    path = save(tmp_path / "other.onnx", nodes, weights, kind=kind)
    assert integer_coverage(path).macs_total == 16


def test_files_that_take_any_size_are_profiled_on_the_images_own(tmp_path: Path) -> None:
    weights = [helper.make_tensor("weights", TensorProto.FLOAT, (2, 1, 3, 3), [0.1] * 18)]
    nodes = [helper.make_node("Conv", ["image", "weights"], ["logits"])]
    path = save(tmp_path / "any.onnx", nodes, weights, sizes=["N", 1, "H", "W"])
    assert integer_coverage(path, image=(1, 8, 6)).macs_total == 2 * 9 * 6 * 4


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bik,kj->bij", [(2, 3, 4), (4, 5)]),
        ("bhqd,bhkd->bhqk", [(1, 2, 7, 4), (1, 2, 5, 4)]),
        ("...ij, ...jk", [(2, 3, 4, 5), (2, 3, 5, 6)]),
        ("i,i->", [(9,), (9,)]),
    ],
)
def test_products_in_einstein_notation_count(equation: str, shapes: list[tuple[int, ...]], tmp_path: Path) -> None:
    with FlopCounterMode(display=False) as counter:
        torch.einsum(equation.replace(" ", ""), *(torch.ones(shape) for shape in shapes))
    factors = [ones(f"factor{index}", shape) for index, shape in enumerate(shapes)]
    classes = helper.make_tensor("classes", TensorProto.FLOAT, (4, 3), [0.1] * 12)
    nodes = [
        helper.make_node("Einsum", [factor.name for factor in factors], ["product"], equation=equation),
        helper.make_node("ReduceSum", ["product"], ["total"], keepdims=0),
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "classes"], ["scores"]),
        helper.make_node("Add", ["scores", "total"], ["logits"]),
    ]
    nodes[0].input[0] = "varied"  # or it would be a constant, and folded
    nodes.insert(0, helper.make_node("ReduceMean", ["image"], ["grey"], keepdims=0))
    nodes.insert(1, helper.make_node("Add", ["factor0", "grey"], ["varied"]))
    coverage = integer_coverage(save(tmp_path / "einsum.onnx", nodes, [*factors, classes]))
    assert [layer.macs for layer in coverage.layers] == [counter.get_total_flops() // 2, 4 * 3]
    assert {layer.kernel for layer in coverage.layers} >= {"Einsum"}


@pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers_count(operator: str, gates: int, directions: int, tmp_path: Path) -> None:
    state, features, steps = 5, 2, 2
    both = "bidirectional" if directions == 2 else "forward"
    weights = [
        ones("rows", (3,), [2, 1, 2]),
        ones("read", (directions, gates * state, features)),
        ones("kept", (directions, gates * state, state)),
    ]
    nodes = [
        helper.make_node("Reshape", ["image", "rows"], ["series"]),  # rows of an image, one after another
        helper.make_node(operator, ["series", "read", "kept"], ["", "last"], hidden_size=state, direction=both),
        helper.make_node("Transpose", ["last"], ["turned"], perm=[1, 0, 2]),
        helper.make_node("Flatten", ["turned"], ["logits"]),
    ]
    coverage = integer_coverage(save(tmp_path / "recurrent.onnx", nodes, weights))
    assert coverage.macs_total == steps * directions * gates * state * (features + state)
    assert (coverage.share, [layer.kernel for layer in coverage.layers]) == (0.0, [operator])


def ones(name: str, shape: tuple[int, ...], values: list[int] | None = None) -> onnx.TensorProto:
    if values is not None:
        return helper.make_tensor(name, TensorProto.INT64, shape, values)
    return helper.make_tensor(name, TensorProto.FLOAT, shape, np.ones(shape).ravel())


def test_a_graph_without_layers_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "empty.onnx", [helper.make_node("Flatten", ["image"], ["logits"])], [])
    with pytest.raises(ToolkitError, match="no layer"):
        integer_coverage(path)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: list[onnx.TensorProto],
    *,
    kind: int = TensorProto.FLOAT,
    sizes: Sequence[str | int] = ("N", 1, 2, 2),
) -> Path:
    image = helper.make_tensor_value_info("image", kind, sizes)
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "test", [image], [logits], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_profiles_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twin: OnnxModel = export_onnx(wrap(narrow(), (3, 16, 16)), tmp_path / "float.onnx", ExportConfig())
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    integer_coverage(twin.path)
    assert [path.name for path in tmp_path.iterdir()] == ["float.onnx"]
