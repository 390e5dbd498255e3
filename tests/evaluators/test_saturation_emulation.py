from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, numpy_helper

from tests.graphs import f32, integers, model, node, qdq_classifier, save, u8
from toolkit.evaluators import saturation_emulation
from toolkit.evaluators.cost import integer_coverage
from toolkit.evaluators.saturating_layers import Saturating, Spared, saturates_here, saturating_layers
from toolkit.evaluators.saturation_emulation import (
    Overflows,
    SaturatingTwin,
    _saturating,
    clipped_off,
    risky_pairs,
    twin_of_session,
)
from toolkit.evaluators.surrogate import Twin, build_twin
from toolkit.evaluators.twin.graph import read_attributes
from toolkit.evaluators.twin.network import Step
from toolkit.evaluators.twin.operators import OPERATORS
from toolkit.evaluators.twin.values import Scaled
from toolkit.exporters.session import OnnxPredictor

LEVELS = torch.arange(256, dtype=torch.float32)


def emulate(path: Path) -> SaturatingTwin:
    running = integer_coverage(path)
    return SaturatingTwin(build_twin(path), path, running)


@pytest.mark.parametrize(
    ("activations", "weights", "wanted"),
    [
        ((255, 255), (127, 127), 32767),
        ((255, 255), (-128, -128), -32768),
        ((255, 255), (64, 64), 32640),  # as much as seven bits reach
        ((255, 255), (-64, -64), -32640),
        ((255, 255), (127, -128), -255),
        ((255, 2), (127, 127), 32639),
        ((255, 3), (127, 127), 32766),
        ((255, 4), (127, 127), 32767),
    ],
)
def test_the_sum_of_two_products_is_held_in_sixteen_bits(
    activations: tuple[int, int], weights: tuple[int, int], wanted: int
) -> None:
    columns, rows = torch.tensor(activations).float()[:, None], torch.tensor([weights]).float()
    off, overflows = clipped_off(columns, risky_pairs(rows), 1)
    exact = int((columns * rows.T).sum())
    assert exact - int(off) == wanted
    assert overflows == (exact != wanted)


def test_pairs_of_seven_bits_never_overflow_and_those_beyond_do() -> None:
    """All of them: two weights in [-64, 64] with the largest activations."""
    seven = torch.cartesian_prod(torch.arange(-64.0, 65), torch.arange(-64.0, 65))
    assert not len(risky_pairs(seven).channel)
    assert len(risky_pairs(torch.tensor([[65.0, 64.0], [-64.0, -65.0], [127.0, 1.0], [127.0, 2.0]])).channel) == 3


@given(
    kernel=st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    channels=st.integers(1, 4),
    group=st.sampled_from([1, 2]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 1),
    zero_point=st.integers(0, 255),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_a_convolution_is_what_numpy_makes_of_its_pairs(
    kernel: tuple[int, int], channels: int, group: int, stride: int, dilation: int, padding: int, zero_point: int,
    seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (2, channels * group, 6, 6))
    weights = rng.integers(-128, 128, (4, channels, *kernel))
    wanted, overflows = saturating_convolution(image, weights, group, stride, dilation, padding, zero_point)
    made = model(
        [
            node("DequantizeLinear", ["image", "one", "point"], ["x"]),
            node("DequantizeLinear", ["w", "one", "zero"], ["weight"]),
            node(
                "Conv", ["x", "weight"], ["y"], "", name="layer", group=group, strides=[stride] * 2,
                dilations=[dilation] * 2, pads=[padding] * 4,
            ),
            node("QuantizeLinear", ["image", "one", "point"], ["unused"]),
        ],
        {"one": f32(1), "point": u8(zero_point), "w": weights.astype(np.int8), "zero": np.int8(0)},
    )  # fmt: skip
    off, found = clip_of(made, image - zero_point, weights, zero_point)
    exact, none = saturating_convolution(image, weights, group, stride, dilation, padding, zero_point, limit=10**9)
    assert none == 0
    assert found == overflows
    assert np.array_equal(exact - off, wanted)


def clip_of(made: ModelProto, centred: Any, weights: Any, zero_point: int) -> tuple[Any, int]:
    """What the emulation takes off the convolution of a graph, and the overflows that it counts."""
    convolution = next(entry for entry in made.graph.node if entry.op_type == "Conv")
    attributes = read_attributes(convolution)
    step = Step("Conv", OPERATORS["Conv"](attributes), ("x", "weight"), ("y",), attributes)
    one = torch.ones(())
    first = Scaled(torch.tensor(centred).float(), one, float(zero_point))
    second = Scaled(torch.tensor(weights).float(), one)
    counted = Overflows("layer", "Conv")
    found = _saturating(step, counted)(first, second)
    exact = step.function(first, second)
    pairs = found.values.numel() * -(-int(np.prod(weights.shape[1:])) // 2)
    assert counted.pairs == pairs
    return (exact.values - found.values).numpy().astype(np.int64), counted.overflows


def saturating_convolution(
    image: Any, weights: Any, group: int, stride: int, dilation: int, padding: int, zero_point: int,
    limit: int = 0,
) -> tuple[Any, int]:  # fmt: skip
    """Sums of centred activations by loops over single outputs; pairs along (kernel position, channel) are clipped."""
    padded = np.pad(image, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2), constant_values=zero_point)
    filters, per_group, height, width = weights.shape
    span = [(size - 1) * dilation + 1 for size in (height, width)]
    out = [(size - reach) // stride + 1 for size, reach in zip(padded.shape[2:], span, strict=True)]
    found = np.zeros((len(image), filters, *out), np.int64)
    overflows = 0
    for n, f, y, x in np.ndindex(found.shape):
        first = f // (filters // group) * per_group
        window = padded[n, first : first + per_group, y * stride :, x * stride :]
        window = window[:, : span[0] : dilation, : span[1] : dilation]
        products = (window * weights[f]).transpose(1, 2, 0).ravel()
        pairs = np.append(products, [0] * (len(products) % 2)).reshape(-1, 2).sum(1)
        clipped = np.clip(pairs, *((-limit, limit) if limit else (-32768, 32767)))
        overflows += int((clipped != pairs).sum())
        found[n, f, y, x] = clipped.sum() - zero_point * weights[f].sum()
    return found, overflows


def reference(made: ModelProto, images: Any, *, saturating: bool) -> Any:
    """Logits of `qdq_classifier` by numpy in integers."""
    at = {item.name: numpy_helper.to_array(item) for item in made.graph.initializer}
    limit = 0 if saturating else 10**9
    first = np.clip(np.rint(images / at["s0"]), 0, 255).astype(np.int64)
    sums, _ = saturating_convolution(first, at["w1"].astype(np.int64), 1, 1, 1, 1, 0, limit)
    ratio = (at["s0"] * at["ws1"] / at["s1"]).astype(np.float32)[:, None, None]
    position = (sums + at["b1"][:, None, None]).astype(np.float32) * ratio
    second = np.clip(np.rint(position) + int(at["z1"]), 0, 255).astype(np.int64).reshape(len(images), -1)
    logits, _ = saturating_convolution(
        second[:, :, None, None], at["w2"].astype(np.int64)[:, :, None, None], 1, 1, 1, 0, int(at["z1"]), limit
    )
    return logits[:, :, 0, 0] * (at["s1"] * at["ws2"])


def classifier() -> ModelProto:
    """`qdq_classifier` with names, and integers right in front of its Gemm, so that both layers run in integers."""
    made = qdq_classifier()
    for entry in made.graph.node:
        if entry.op_type in ("Conv", "Gemm"):
            entry.name = entry.op_type
        if entry.output[0] == "x1":
            entry.CopyFrom(node("Flatten", ["q1"], ["f1"]))
        elif entry.op_type == "Flatten":
            entry.CopyFrom(node("DequantizeLinear", ["f1", "s1", "z1"], ["flat"]))
    return made


@pytest.mark.usefixtures("quiet")
def test_a_whole_graph_is_what_numpy_makes_of_it_with_and_without_saturation(tmp_path: Path) -> None:
    made = classifier()
    path = save(made, tmp_path / "m.onnx")
    images = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    emulated, session = emulate(path), OnnxPredictor(path)
    exact = torch.from_numpy(reference(made, images.numpy(), saturating=False)).float()
    clipped = torch.from_numpy(reference(made, images.numpy(), saturating=True)).float()
    torch.testing.assert_close(build_twin(path).predict(images), exact, rtol=1e-4, atol=1e-3)
    here = clipped if saturates_here() else exact
    torch.testing.assert_close(session.predict(images), here, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(emulated.predict(images), clipped, rtol=1e-4, atol=1e-3)
    assert (exact.argmax(1) != clipped.argmax(1)).sum() >= 2
    assert [row.layer for row in emulated.layers] == ["Conv", "Gemm"]
    assert [row.pairs for row in emulated.layers] == [40 * 4 * 36 * 14, 40 * 5 * 72]
    assert all(0.01 < row.share < 0.5 for row in emulated.layers)
    assert emulated.predict(images[:0]).shape == (0, 5)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("saturates", [True, False])
def test_the_twin_of_the_session_computes_as_the_machine_does(
    saturates: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = classifier()
    path = save(made, tmp_path / "m.onnx")
    images = torch.rand(40, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    here = saturates_here()
    monkeypatch.setattr(saturation_emulation, "saturates_here", lambda: saturates)
    twin, exact = twin_of_session(path), build_twin(path)
    wanted = torch.from_numpy(reference(made, images.numpy(), saturating=saturates)).float()
    torch.testing.assert_close(twin.predict(images), wanted, rtol=1e-4, atol=1e-3)
    assert torch.equal(twin_of_session(path, provider="cuda").predict(images), exact.predict(images))
    if saturates == here:
        torch.testing.assert_close(twin.predict(images), OnnxPredictor(path).predict(images), rtol=1e-4, atol=1e-3)
    assert torch.equal(gradient(twin, images[:1]), gradient(exact, images[:1])) or saturates
    assert bool(gradient(twin, images).abs().flatten(1).amax(dim=1).gt(0).all()), "straight through what is clipped"


def gradient(twin: Twin, images: torch.Tensor) -> torch.Tensor:
    """Of the first logit."""
    moved = images.clone().requires_grad_()
    twin.module(moved)[:, 0].sum().backward()
    assert moved.grad is not None
    return moved.grad


@pytest.mark.usefixtures("quiet")
def test_without_overflows_the_emulation_is_the_twin(tmp_path: Path) -> None:
    made = classifier()
    for item in made.graph.initializer:
        if item.name in ("w1", "w2"):
            halved = numpy_helper.to_array(item) // 2
            item.CopyFrom(numpy_helper.from_array(halved.astype(np.int8), item.name))
    path = save(made, tmp_path / "m.onnx")
    images = torch.rand(20, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    emulated = emulate(path)
    assert torch.equal(emulated.predict(images), build_twin(path).predict(images))
    assert [row.overflows for row in emulated.layers] == [0, 0] and not emulated.spared


def layer(name: str, weight: Any, first: Any, **attributes: Any) -> ModelProto:
    """One quantised convolution of three channels."""
    constants = {"s": f32(0.01), "zx": first, "w": weight, "zw": np.zeros_like(weight, shape=())}
    return model(
        [
            node("QuantizeLinear", ["image", "s", "zx"], ["q"]),
            node("DequantizeLinear", ["q", "s", "zx"], ["x"]),
            node("DequantizeLinear", ["w", "s", "zw"], ["weight"]),
            node("Conv", ["x", "weight"], ["y"], name=name, **attributes),
        ],
        constants,
    )


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (layer("c", integers(3, 1, 3, 3), u8(0), group=3), "depthwise: its kernel widens to 16 bits first"),
        (layer("c", integers(4, 3, 3, 3, kind=np.uint8), u8(0)), "unsigned weights: their kernel widens them first"),
        (layer("other", integers(4, 3, 3, 3), u8(0)), "a float kernel"),
    ],
)
def test_layers_whose_kernels_do_not_saturate_are_named(made: ModelProto, reason: str) -> None:
    found, spared = saturating_layers(made, {"c"})
    assert not found
    (name,) = [entry.name for entry in made.graph.node if entry.op_type == "Conv"]
    assert spared == (Spared(name, reason),)


@pytest.mark.parametrize(
    ("point", "reason"),
    [
        (u8(0), "a product of two activations: its kernel widens them first"),
        (np.int8(0), "not emulated: a product of two activations, of which the second is signed, saturates"),
    ],
)
def test_products_of_two_activations_saturate_where_the_second_is_signed(point: Any, reason: str) -> None:
    nodes = [
        node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["x"]),
        node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]),
        node("MatMul", ["x", "t"], ["y"], name="m"),
    ]
    found, spared = saturating_layers(model(nodes, {"s": f32(0.01), "z": point}), {"m"})
    assert not found and spared == (Spared("m", reason),)


@pytest.mark.parametrize(("point", "shift"), [(u8(7), 0), (np.int8(7), 128)])
def test_a_layer_of_the_same_types_is_found(point: Any, shift: int) -> None:
    found, spared = saturating_layers(layer("c", integers(4, 3, 3, 3), point), {"c"})
    assert found == {"y": Saturating("c", shift)} and not spared


WEIGHTS: dict[str, Any] = {
    "Conv": (8, 4, 3, 3), "Conv in groups": (8, 2, 3, 3), "Conv by depth": (4, 1, 3, 3), "Gemm": (8, 4 * 49),
}  # fmt: skip


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("weights", [np.int8, np.uint8])
@pytest.mark.parametrize(("activations", "point"), [(np.uint8, 0), (np.uint8, 90), (np.int8, 3)])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_twin_of_the_session_gives_its_bits_whatever_the_types(
    kind: str, activations: Any, point: int, weights: Any, count: int, tmp_path: Path
) -> None:
    """Filters of large weights of one sign: with int8 weights some sums overflow on machines without VNNI."""
    shape = WEIGHTS[kind]
    drawn = np.random.default_rng(0).integers(60, 128, shape)
    drawn[::2] *= 1 if weights is np.uint8 else -1
    constants = {
        "s": f32(1 / 255), "zx": activations(point), "w": drawn.astype(weights), "one": f32(1), "zw": weights(0),
        "so": f32(drawn[0].size / 4), "zo": activations(point), "axes": np.array([2, 3]),
    }  # fmt: skip
    group = 1 if kind == "Gemm" else 4 // shape[1]
    nodes = [
        node("QuantizeLinear", ["image", "s", "zx"], ["q"]),
        *([node("Flatten", ["q"], ["f"])] if kind == "Gemm" else []),
        node("DequantizeLinear", ["f" if kind == "Gemm" else "q", "s", "zx"], ["x"]),
        node("DequantizeLinear", ["w", "one", "zw"], ["weight"]),
        node("Gemm", ["x", "weight"], ["y"], transB=1)
        if kind == "Gemm"
        else node("Conv", ["x", "weight"], ["y"], group=group, strides=[2, 2], pads=[1] * 4),
        node("QuantizeLinear", ["y", "so", "zo"], ["p"]),
        node("DequantizeLinear", ["p", "so", "zo"], ["logits" if kind == "Gemm" else "z"]),
        *([] if kind == "Gemm" else [node("ReduceMean", ["z", "axes"], ["logits"], keepdims=0)]),
    ]
    path = save(model(nodes, constants, shape=("N", 4, 7, 7)), tmp_path / "m.onnx")
    images = torch.rand(count, 4, 7, 7, generator=torch.Generator().manual_seed(1))
    twin, session = twin_of_session(path), OnnxPredictor(path)
    torch.testing.assert_close(twin.predict(images), session.predict(images), rtol=1e-5, atol=1e-3)
