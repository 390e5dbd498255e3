from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.exporters.small import CIFAR, GREY, pictures, tiny, wrap
from tests.graphs import FLOAT, UINT8, f32, i64, integers, model, node, qdq_classifier, save, weights
from toolkit.artifacts import Normalization, Normalized, TorchModel
from toolkit.attacks.surrogate import Surrogate
from toolkit.config import ExportConfig, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.saturation_emulation import twin_of_session
from toolkit.evaluators.surrogate import (
    Twin,
    UnconvertibleGraph,
    build_twin,
    measure_fidelity,
    saturation,
    twin_model,
)
from toolkit.evaluators.twin.network import TwinNetwork
from toolkit.exporters.interface import read_interface
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import quantize_int8
from toolkit.exporters.session import OnnxPredictor

from .test_fidelity import Shifted

IMAGES = torch.rand(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
SMALL = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(wrap(tiny(), (1, 8, 8)), tmp_path_factory.mktemp("twin") / "f.onnx", ExportConfig()).path


@pytest.fixture(scope="module")
def integer_file(float_file: Path) -> Path:
    path = float_file.with_name("q.onnx")
    exported = export_onnx(wrap(tiny(), (1, 8, 8)), float_file.with_name("again.onnx"), ExportConfig())
    quantize_int8(exported, path, pictures(64, (1, 8, 8)), QuantizeConfig())
    return path


def exact(path: Path, images: torch.Tensor, **options: Any) -> Twin:
    """The twin of a file, after a check that it computes what ONNX Runtime computes."""
    twin = twin_of_session(path, **options)
    predictor = OnnxPredictor(path, interface=options.get("interface"), threads=1)
    torch.testing.assert_close(twin.predict(images), predictor.predict(images), rtol=1e-5, atol=1e-5)
    assert twin.predict(images).std() > 0.01
    return twin


def test_our_float_file_has_the_logits_and_gradients_of_the_network(float_file: Path) -> None:
    twin = exact(float_file, SMALL)
    assert (twin.quantised, twin.classes, twin.input_shape) == (False, 3, (1, 8, 8))
    original = wrap(tiny(), (1, 8, 8))
    labels = torch.zeros(40, dtype=torch.int64)
    gradients = [
        Surrogate(module, normalization, "float32").gradient(SMALL, labels)
        for module, normalization in ((original.module, GREY), (twin.module, twin.normalization))
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_our_integer_file_is_met_exactly_and_gives_nearly_the_gradient_of_the_float_one(integer_file: Path) -> None:
    twin = twin_of_session(integer_file)
    assert twin.quantised
    predictor = OnnxPredictor(integer_file, threads=1)
    assert torch.equal(twin.predict(SMALL).argmax(1), predictor.predict(SMALL).argmax(1))
    torch.testing.assert_close(twin.predict(SMALL), predictor.predict(SMALL), rtol=1e-5, atol=1e-5)
    labels = predictor.predict(SMALL).argmax(1)
    original = wrap(tiny(), (1, 8, 8))
    wanted = Surrogate(original.module, GREY, "float32").gradient(SMALL, labels).flatten()
    for precision in ("float32", "bfloat16"):
        surrogate = Surrogate(twin.module, twin.normalization, precision, input_shape=(1, 8, 8))
        found = surrogate.gradient(SMALL, labels).flatten()
        assert float(nn.functional.cosine_similarity(found, wanted, dim=0)) > 0.9


def test_an_input_quantiser_per_channel_with_the_normalisation_folded_in(tmp_path: Path) -> None:
    exported = export_onnx(wrap(tiny(3), (3, 8, 8), CIFAR), tmp_path / "f.onnx", ExportConfig())
    quantize_int8(exported, tmp_path / "q.onnx", pictures(64, (3, 8, 8)), QuantizeConfig(), input_margin=0.1)
    exact(tmp_path / "q.onnx", torch.rand(20, 3, 8, 8) * 1.2 - 0.1)


@pytest.mark.parametrize("bias_units", [1.0, 1.5], ids=["aligned bias", "bias in other units"])
def test_a_strangers_qdq_file_is_met(bias_units: float, tmp_path: Path) -> None:
    exact(save(qdq_classifier(bias_units=bias_units), tmp_path / "m.onnx"), IMAGES)


def test_a_qoperator_file_is_rewritten_first(tmp_path: Path) -> None:
    constants = {
        "s": f32(1 / 255), "z": np.uint8(0), "w": integers(4, 3, 3, 3), "ws": f32(0.01), "wz": np.int8(0),
        "t": f32(0.05), "y": np.uint8(128), "m": integers(5, 64), "ms": f32(0.01),
    }  # fmt: skip
    nodes = [
        node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        node("QLinearConv", ["q", "s", "z", "w", "ws", "wz", "t", "y"], ["r"]), node("Flatten", ["r"], ["f"]),
        node("QGemm", ["f", "t", "y", "m", "ms", "wz", ""], ["logits"], "com.microsoft", transB=1),
    ]  # fmt: skip
    assert exact(save(model(nodes, constants), tmp_path / "m.onnx"), IMAGES).quantised


def linear_file(path: Path, shape: Any, kind: int = FLOAT, *, tail: bool = False) -> Path:
    nodes = [node("Cast", ["image"], ["cast"], to=FLOAT), node("Div", ["cast", "unit"], ["small"])]
    nodes += [node("Flatten", ["small"], ["flat"]), node("MatMul", ["flat", "w"], ["raw"])]
    nodes.append(node("Softmax" if tail else "Identity", ["raw"], ["logits"]))
    constants = {"w": weights(108, 5), "unit": f32(255 if kind == UINT8 else 1)}
    return save(model(nodes, constants, shape=shape, kind=kind), path)


def test_channels_last_files(tmp_path: Path) -> None:
    exact(linear_file(tmp_path / "m.onnx", ("N", 6, 6, 3)), IMAGES)


def test_whole_number_files_round_straight_through(tmp_path: Path) -> None:
    twin = exact(linear_file(tmp_path / "m.onnx", ("N", 3, 6, 6), UINT8), IMAGES)
    images = IMAGES.clone().requires_grad_(True)
    twin.module(images)[:, 0].sum().backward()
    wanted = torch.from_numpy(weights(108, 5)[:, 0]).view(3, 6, 6).expand(6, 3, 6, 6)
    torch.testing.assert_close(images.grad, wanted)


def test_probabilities_have_their_logits_in_the_twin(tmp_path: Path) -> None:
    path = linear_file(tmp_path / "m.onnx", ("N", 3, 6, 6), tail=True)
    twin, predictor = twin_of_session(path), OnnxPredictor(path, threads=1)
    logits = twin.predict(IMAGES)
    torch.testing.assert_close(logits, IMAGES.flatten(1) @ torch.from_numpy(weights(108, 5)))
    torch.testing.assert_close(logits.log_softmax(1), predictor.predict(IMAGES))
    assert measure_fidelity(twin, predictor, [IMAGES]).relative < 1e-5


def test_normalisation_outside_the_file_moves_into_the_module(tmp_path: Path) -> None:
    path = linear_file(tmp_path / "m.onnx", ("N", 3, 6, 6))
    interface = read_interface(path, normalization=Normalization((0.5, 0.4, 0.3), (0.5, 0.25, 0.2)))
    twin = exact(path, IMAGES, interface=interface)
    assert twin.normalization == interface.normalization


def fixed_batch(path: Path, target: list[int]) -> Path:
    nodes = [node("Reshape", ["image", "target"], ["flat"]), node("MatMul", ["flat", "w"], ["logits"])]
    return save(model(nodes, {"w": weights(108, 5), "target": i64(target)}, shape=(4, 3, 6, 6)), path)


@pytest.mark.parametrize(("target", "kept"), [([4, -1], 4), ([-1, 108], None)])
def test_a_fixed_batch_is_kept_only_where_something_depends_on_it(
    target: list[int], kept: int | None, tmp_path: Path
) -> None:
    twin = exact(fixed_batch(tmp_path / "m.onnx", target), IMAGES)
    assert isinstance(twin.module.network, TwinNetwork) and twin.module.network.entry.batch == kept
    images = IMAGES.clone().requires_grad_(True)
    twin.module(images).sum().backward()
    assert images.grad is not None and bool((images.grad != 0).all())


def test_images_of_any_size_need_a_size(tmp_path: Path) -> None:
    nodes = [node("GlobalAveragePool", ["image"], ["pooled"]), node("Flatten", ["pooled"], ["logits"])]
    outputs: dict[str, Any] = {"logits": (FLOAT, ("N", 3))}
    path = save(model(nodes, {}, shape=("N", 3, "H", "W"), outputs=outputs), tmp_path / "m.onnx")
    with pytest.raises(ToolkitError, match="size of the images is not known") as caught:
        build_twin(path)
    assert "[3, any, any]" in caught.value.found
    assert build_twin(path, input_shape=(3, 5, 7)).input_shape == (3, 5, 7)
    with pytest.raises(ToolkitError, match="do not fit"):
        build_twin(path, input_shape=(1, 5, 7))


def test_operators_without_a_conversion_are_listed(tmp_path: Path) -> None:
    nodes = [node("Flatten", ["image"], ["flat"]), node("Hardmax", ["flat"], ["hard"])]
    nodes.append(node("Unique", ["hard"], ["logits"]))
    outputs: dict[str, Any] = {"logits": (FLOAT, ("N", 5))}
    with pytest.raises(UnconvertibleGraph, match="cannot be made differentiable") as caught:
        build_twin(save(model(nodes, {}, outputs=outputs), tmp_path / "m.onnx"))
    assert caught.value.operators == ("Hardmax", "Unique")
    assert "Hardmax, Unique" in caught.value.found and "square" in caught.value.fix


def test_the_twin_is_a_network_like_any_other(integer_file: Path) -> None:
    twin = build_twin(integer_file)
    copied = copy.deepcopy(twin.module).to(torch.float64).to(torch.float32).to(memory_format=torch.channels_last)
    torch.testing.assert_close(copied(SMALL), twin.module(SMALL))
    assert all(not parameter.requires_grad for parameter in twin.module.parameters())
    named = twin_model(twin, ("a", "b", "c"), "sample")
    assert isinstance(named, TorchModel) and isinstance(named.module, Normalized)
    assert (named.spec.class_names, named.spec.input_shape, named.spec.dataset) == (
        ("a", "b", "c"),
        (1, 8, 8),
        "sample",
    )
    assert twin_model(twin).spec.class_names == ("0", "1", "2")


def test_fidelity_of_a_twin_is_that_of_its_model(integer_file: Path) -> None:
    twin, predictor = twin_of_session(integer_file), OnnxPredictor(integer_file, threads=1)
    for candidate in (twin, twin_model(twin)):
        found = measure_fidelity(candidate, predictor, torch.split(SMALL, 16), torch.split(SMALL.flip(0), 16))
        assert found.valid and found.relative < 1e-5 and found.agreement_clean.total == 40
    assert not measure_fidelity(twin, Shifted(predictor), [SMALL]).valid


def test_saturation_is_what_a_count_finds(tmp_path: Path) -> None:
    """Input quantised on [0, 0.5]; the second quantiser of `qdq_classifier` represents [-0.4, 0.62]."""
    path = save(qdq_classifier(input_scale=0.5 / 255), tmp_path / "m.onnx")
    twin = build_twin(path)
    found = saturation(twin, torch.split(IMAGES, 2))
    quantised = np.clip(np.rint(IMAGES.numpy() / np.float32(0.5 / 255)), 0, 255) * np.float32(0.5 / 255)
    graph = qdq_classifier(input_scale=0.5 / 255)
    constants = {item.name: torch.from_numpy(np.array(value)) for item, value in named_constants(graph)}
    weight = constants["w1"].float() * constants["ws1"].view(-1, 1, 1, 1)
    bias = constants["b1"].float() * constants["bs1"]
    sums = nn.functional.conv2d(torch.from_numpy(quantised), weight, bias, padding=1).numpy()
    codes = np.rint(sums / np.float32(0.004)) + 100
    assert found["q0"] == pytest.approx(float((np.rint(IMAGES.numpy() / np.float32(0.5 / 255)) > 255).mean()))
    assert found["q1"] == pytest.approx(float(((codes < 0) | (codes > 255)).mean()), abs=2e-3)
    assert 0.05 < found["q1"] < 0.95
    assert set(found) == {"q0", "q1"}


def named_constants(graph: Any) -> list[tuple[Any, Any]]:
    from onnx import numpy_helper

    return [(item, numpy_helper.to_array(item)) for item in graph.graph.initializer]


def test_float_graphs_saturate_nowhere(float_file: Path) -> None:
    assert saturation(build_twin(float_file), [SMALL]) == {}
