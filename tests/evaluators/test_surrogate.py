from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper
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

AS_THEY_ARE = Normalization((0.0,) * 3, (1.0,) * 3)
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


def test_sigmoids_have_their_logits_in_the_twin(tmp_path: Path) -> None:
    """Of networks that learnt one class against the rest: behind the Sigmoid nearly all gradients are lost."""
    made = qdq_classifier(tail=False)
    made.graph.node.append(node("Sigmoid", ["raw"], ["logits"]))
    path = save(made, tmp_path / "q.onnx")
    twin, plain = build_twin(path), build_twin(save(qdq_classifier(), tmp_path / "plain.onnx"))
    assert read_interface(path).logits_name == "raw"
    torch.testing.assert_close(twin.predict(IMAGES), plain.predict(IMAGES))
    found = measure_fidelity(twin, OnnxPredictor(path, threads=1), [IMAGES])
    assert found.valid and found.agreement_clean.value == 1.0


def gradient(path: Path, images: torch.Tensor) -> torch.Tensor:
    leaf = images.clone().requires_grad_(True)
    build_twin(path).module(leaf).square().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("front", [[], ["Sub", "Div"]], ids=["bare", "normalised"])
def test_pixels_outside_of_the_input_quantiser_can_be_moved_back_in(front: list[str], tmp_path: Path) -> None:
    """A range that leaves out the lightest pixels, as percentiles choose it."""
    made = qdq_classifier(input_scale=0.6 / 255)
    for number, operator in enumerate(front):
        made.graph.node.insert(number, node(operator, [f"p{number}" if number else "image", "one"], [f"p{number + 1}"]))
    made.graph.initializer.append(numpy_helper.from_array(f32(1.0), "one"))
    if front:
        quantiser = next(one for one in made.graph.node if one.op_type == "QuantizeLinear")
        quantiser.input[0] = f"p{len(front)}"
    found = gradient(save(made, tmp_path / "q.onnx"), IMAGES + bool(front))
    outside = IMAGES > 0.65
    assert outside.any() and bool((found[outside] != 0).float().mean() > 0.9)


@pytest.mark.parametrize("operators", [["Round"], ["Floor"], ["Ceil"], ["Cast", "Cast"]], ids=lambda names: names[0])
def test_steps_that_a_graph_takes_itself_are_straight_through(operators: list[str], tmp_path: Path) -> None:
    """As files of networks do that learnt to be rounded, or that see fewer grey levels."""
    nodes = [node("Mul", ["image", "levels"], ["p0"])]
    for number, operator in enumerate(operators):
        how: dict[str, Any] = {"to": (6, 1)[number]} if operator == "Cast" else {}
        nodes.append(node(operator, [f"p{number}"], [f"p{number + 1}"], **how))
    nodes += [node("Flatten", [f"p{len(operators)}"], ["flat"]), node("Gemm", ["flat", "w"], ["logits"], transB=1)]
    path = save(model(nodes, {"levels": f32(7.3), "w": weights(5, 108)}), tmp_path / "r.onnx")
    exact(path, IMAGES)
    plain = [nodes[0], node("Flatten", ["p0"], ["flat"]), nodes[-1]]
    smooth = save(model(plain, {"levels": f32(7.3), "w": weights(5, 108)}), tmp_path / "s.onnx")
    leaf = IMAGES.clone().requires_grad_(True)
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    found = [torch.autograd.grad((build_twin(one).module(leaf) * weight).sum(), leaf)[0] for one in (path, smooth)]
    torch.testing.assert_close(found[0], found[1])


def test_nodes_may_stand_in_any_order(tmp_path: Path) -> None:
    """ONNX Runtime's own float16 converter appends its casts at the end."""
    made = qdq_classifier()
    nodes = list(made.graph.node)[::-1]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    twin, plain = build_twin(save(made, tmp_path / "r.onnx")), build_twin(save(qdq_classifier(), tmp_path / "q.onnx"))
    torch.testing.assert_close(twin.predict(IMAGES), plain.predict(IMAGES))


def test_a_graph_that_breaks_the_twin_has_none(tmp_path: Path) -> None:
    """Torch has no Resize that keeps a factor which makes no whole number of pixels."""
    resize = node("Resize", ["image", "", "factors"], ["r"], mode="linear")
    nodes = [resize, node("GlobalAveragePool", ["r"], ["g"]), node("Flatten", ["g"], ["logits"])]
    path = save(model(nodes, {"factors": f32(1, 1, 1.3, 1.3)}), tmp_path / "r.onnx")
    with pytest.raises(UnconvertibleGraph, match="cannot be made differentiable") as caught:
        build_twin(path)
    assert "no whole number of pixels" in caught.value.found


def test_an_infinite_derivative_still_tells_the_way(tmp_path: Path) -> None:
    """Of pixels that are corrected for gamma: at black it is infinite."""
    nodes = [
        node("Pow", ["image", "gamma"], ["p"]), node("Flatten", ["p"], ["flat"]),
        node("Gemm", ["flat", "w"], ["logits"], transB=1),
    ]  # fmt: skip
    path = save(model(nodes, {"gamma": f32(0.45), "w": weights(5, 108)}), tmp_path / "g.onnx")
    images = IMAGES.clone()
    images[:, :, :2] = 0
    surrogate = Surrogate(twin_model(build_twin(path)).module, AS_THEY_ARE, "float32", input_shape=(3, 6, 6))
    found = surrogate.gradient(images, torch.zeros(6, dtype=torch.int64))
    assert found.isfinite().all() and found.square().sum().isfinite() and (found[:, :, :2].abs() > 1e6).all()


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
