from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from toolkit.artifacts import OnnxModel, TorchModel
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.cost import integer_coverage
from toolkit.exporters import pt2e
from toolkit.exporters.input_range import input_range
from toolkit.exporters.onnx import convert_module, example_images, export_onnx, load_onnx, save_onnx, silence
from toolkit.exporters.precision import COMPUTE, layer_precision, precision_faults
from toolkit.exporters.session import OnnxPredictor

from .small import CIFAR, GREY, lively, pictures, tiny, wrap

pytest.importorskip("torchao", reason="pip install -c constraints.txt '.[dev]'")
SHAPE = (3, 8, 8)


class Block(nn.Module):
    """A stem, pooling, a residual block with batch norms and a shortcut of its own, a linear layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.one, self.one_norm = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.two, self.two_norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.short, self.short_norm = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.last = nn.Linear(16, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.stem_norm(self.stem(x))), 2)
        inner = self.two_norm(self.two(torch.relu(self.one_norm(self.one(x)))))
        inner += self.short_norm(self.short(x))
        logits: torch.Tensor = self.last(torch.relu_(inner).mean((2, 3)))
        return logits


def images(count: int = 64) -> torch.Tensor:
    split = pictures(count, SHAPE)
    return split.take(split.indices).images


def prepared(module: nn.Module, shape: tuple[int, int, int] = SHAPE) -> Any:
    """By torchao's own quantiser for x86."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    batch = torch.export.Dim("N")
    traced = torch.export.export(module, (example_images(shape),), dynamic_shapes=({0: batch},)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    with silence():
        return prepare_pt2e(traced, quantizer)


@dataclass(frozen=True)
class Made:
    """A network, its float twin, what torchao made of it, and how many quantisers were added to that."""

    model: TorchModel
    twin: OnnxModel
    converted: Any
    added: int
    exported: ModelProto
    """What was converted, in ONNX form."""

    @property
    def proto(self) -> ModelProto:
        return load_onnx(self.twin.path)


def watchers(module: Any) -> int:
    return sum("activation_post_process" in str(node.target) for node in module.graph.nodes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    model = lively(wrap(Block(), SHAPE, CIFAR), images())
    twin = export_onnx(model, tmp_path_factory.mktemp("pt2e") / "float.onnx", ExportConfig())
    ready = prepared(model.module)
    before = watchers(ready)
    pt2e.complete(ready)
    added = watchers(ready) - before
    with torch.no_grad():
        assert torch.allclose(ready(images()), model.module(images()), atol=1e-5)
    return make(model, twin, pt2e.convert(ready), added)


def make(model: TorchModel, twin: OnnxModel, converted: Any, added: int = 0) -> Made:
    return Made(model, twin, converted, added, convert_module(converted, SHAPE, 20))


def written(made: Made, path: Path, margin: float = 0.0, kept: tuple[str, ...] = ()) -> ModelProto:
    arithmetic = pt2e.match(made.exported, made.proto)
    graph, in_float = pt2e.write_arithmetic(arithmetic, made.proto, QuantizeConfig(), kept=kept, margin=margin)
    assert in_float == kept
    assert precision_faults(graph, kept=kept) == ()
    save_onnx(graph, path)
    return graph


def test_the_graph_has_the_layers_of_the_float_twin_all_in_integers(made: Made, tmp_path: Path) -> None:
    graph = written(made, tmp_path / "q.onnx", margin=0.1)
    layers = [node.name for node in made.proto.graph.node if node.op_type in COMPUTE]
    assert {layer.name: layer.precision for layer in layer_precision(graph)} == dict.fromkeys(layers, "int8")
    assert integer_coverage(tmp_path / "q.onnx").share == 1
    found = input_range(tmp_path / "q.onnx")
    assert found is not None and found[0] <= -0.1 and found[1] >= 1.1
    assert b".py" not in (tmp_path / "q.onnx").read_bytes()


def test_it_answers_like_the_torch_model_in_its_own_arithmetic(made: Made, tmp_path: Path) -> None:
    written(made, tmp_path / "q.onnx")
    with torch.no_grad():
        wanted, original = made.converted(images()), made.model.module(images())
    found = OnnxPredictor(tmp_path / "q.onnx", optimized=False).predict(images())
    assert (found - wanted).square().mean().sqrt() < 0.05 * original.std()
    assert OnnxPredictor(tmp_path / "q.onnx").predict(images(5)).shape == (5, 3)


def test_scales_and_integers_are_those_of_the_torch_model(made: Made, tmp_path: Path) -> None:
    graph = written(made, tmp_path / "q.onnx")
    constants = {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}
    producers = {name: node for node in graph.graph.node for name in node.output}
    theirs = {name: value.numpy() for name, value in made.converted.named_buffers() if value.dtype == torch.int8}
    found = [constants[producers[node.input[1]].input[0]] for node in graph.graph.node if node.op_type in COMPUTE]
    assert len(theirs) == len(found) == 5
    for integers in found[1:]:  # those of the first are rounded anew where a normalisation of colours is folded
        assert any(_same(value, integers) for value in theirs.values())
    steps = sorted(
        float(node.args[1]) for node in made.converted.graph.nodes if "quantize_per_tensor.default" in str(node.target)
    )
    written_by_us = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    ours = [float(constants[node.input[1]]) for node in written_by_us[1:]]  # behind that of the pixels
    assert all(np.isclose(steps, step, rtol=1e-5).any() for step in ours)


def _same(one: Any, other: Any) -> bool:
    shapes = [one.shape == other.shape, one.T.shape == other.shape]
    return (shapes[0] and np.array_equal(one, other)) or (shapes[1] and np.array_equal(one.T, other))


def test_layers_can_stay_float(made: Made, tmp_path: Path) -> None:
    layers = [node.name for node in made.proto.graph.node if node.op_type in COMPUTE]
    graph = written(made, tmp_path / "q.onnx", kept=(layers[2],))
    assert [layer.name for layer in layer_precision(graph) if layer.precision == "float32"] == [layers[2]]


def test_sums_need_quantisers_that_torchs_own_kernels_do_without(made: Made) -> None:
    assert made.added > 0
    ready = prepared(made.model.module)
    pt2e.complete(ready)
    count = watchers(ready)
    pt2e.complete(ready)
    assert watchers(ready) == count


def test_grey_images_keep_the_integers_of_the_first_layer(tmp_path: Path) -> None:
    model = wrap(tiny(), (1, 8, 8), GREY)
    twin = load_onnx(export_onnx(model, tmp_path / "float.onnx", ExportConfig()).path)
    ready = prepared(model.module, (1, 8, 8))
    with torch.no_grad():
        ready(torch.rand(32, 1, 8, 8))
    converted = pt2e.convert(ready)
    graph, _ = pt2e.write_arithmetic(pt2e.read_arithmetic(converted, twin, (1, 8, 8)), twin, QuantizeConfig())
    integers = [
        numpy_helper.to_array(item) for item in graph.graph.initializer if item.data_type == onnx.TensorProto.INT8
    ]
    theirs = next(value for _, value in converted.named_buffers() if value.dtype == torch.int8 and value.ndim == 4)
    assert any(value.shape == theirs.shape and np.array_equal(value, theirs.numpy()) for value in integers)


def _other_weights(twin: ModelProto) -> None:
    for item in twin.graph.initializer:
        if len(item.dims) == 4 and item.dims[2] == 3:
            item.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(item), item.name))


def _other_operator(twin: ModelProto) -> None:
    next(node for node in twin.graph.node if node.op_type == "Relu").op_type = "Sigmoid"


def _one_more(twin: ModelProto) -> None:
    last = twin.graph.node[-1]
    last.output[0] = "before"
    twin.graph.node.append(onnx.helper.make_node("Relu", ["before"], ["logits"], "more"))


@pytest.mark.parametrize(
    ("change", "found"),
    [(_other_weights, "the weights of"), (_other_operator, "beside Sigmoid"), (_one_more, "operators beside")],
)
def test_another_networks_twin_is_refused(made: Made, change: Callable[[ModelProto], None], found: str) -> None:
    twin = made.proto
    change(twin)
    with pytest.raises(ToolkitError, match="not the float twin's") as caught:
        pt2e.match(made.exported, twin)
    assert found in caught.value.found


def test_activations_of_another_type_are_refused(made: Made) -> None:
    other = ModelProto()
    other.CopyFrom(made.exported)
    quantiser = next(node for node in other.graph.node if node.op_type == "QuantizeLinear")
    zero = next(item for item in other.graph.initializer if item.name == quantiser.input[2])
    zero.CopyFrom(numpy_helper.from_array(np.zeros((), np.int8), zero.name))
    with pytest.raises(ToolkitError, match="not the float twin's") as caught:
        pt2e.match(other, made.proto)
    assert "activations of int8" in caught.value.found


def test_a_missing_package_is_named_with_the_extra_that_has_it() -> None:
    with pytest.raises(ToolkitError, match="is not installed") as caught:
        pt2e.require("no_such_package_of_quantisation")
    assert "no_such_package" in caught.value.found and "[inc]" in caught.value.fix
