from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import ModelProto, NodeProto

from tests.graphs import f32, floats, i32, integers, model, node, save, weights
from toolkit.exporters.qoperator import to_qdq
from toolkit.exporters.session import make_session

MS = "com.microsoft"
U8 = {"s": f32(0.02), "z": np.uint8(120), "t": f32(0.03), "y": np.uint8(90)}
IMAGES = np.random.default_rng(0).normal(size=(2, 3, 6, 6)).astype(np.float32)


def between(*nodes: NodeProto, **constants: Any) -> ModelProto:
    """Nodes from the quantised image `q` to the quantised `r`, between a quantiser and a dequantiser."""
    start = node("QuantizeLinear", ["image", "s", "z"], ["q"])
    return model([start, *nodes, node("DequantizeLinear", ["r", "t", "y"], ["logits"])], U8 | constants)


def outputs(made: ModelProto, path: Path) -> npt.NDArray[np.float32]:
    session = make_session(save(made, path), optimized=False, threads=1)
    return np.asarray(session.run(None, {"image": IMAGES})[0])


def operators(made: ModelProto) -> set[str]:
    return {item.op_type for item in made.graph.node}


# Weights of 7 bits, so that no machine's sums saturate.
CONV = {"w": integers(4, 3, 3, 3) // 2, "ws": floats([0.01, 0.02, 0.03, 0.04]), "wz": np.zeros(4, np.int8)}
GEMM = {"m": integers(6, 5) // 2, "ms": floats([0.01, 0.02, 0.03, 0.04, 0.05]), "mz": np.zeros(5, np.int8)}
GEMM_T = {"m": integers(5, 108) // 2, "ms": floats([0.01, 0.02, 0.03, 0.04, 0.05]) / 4, "mz": np.zeros(5, np.int8)}
FLAT = node("Flatten", ["q"], ["f"])
QUANTISED = {
    "QLinearConv": between(
        node("QLinearConv", ["q", "s", "z", "w", "ws", "wz", "t", "y", "b"], ["r"], pads=[1, 1, 1, 1], strides=[2, 2]),
        **CONV, b=i32([500, -500, 0, 90]),
    ),
    "QLinearConv without bias": between(
        node("QLinearConv", ["q", "s", "z", "w", "wone", "wzero", "t", "y"], ["r"]),
        w=CONV["w"], wone=f32(0.02), wzero=np.int8(0),
    ),
    "QLinearMatMul": between(
        node("QLinearMatMul", ["q", "s", "z", "m", "ms", "mz", "t", "y"], ["r"]), **GEMM
    ),
    "QGemm": between(
        FLAT, node("QGemm", ["f", "s", "z", "m", "ms", "mz", "c", "t", "y"], ["r"], MS, transB=1),
        **GEMM_T, c=i32([500, -500, 0, 90, 7]),
    ),
    "QLinearAdd": between(node("QLinearAdd", ["q", "s", "z", "q", "s", "z", "t", "y"], ["r"], MS)),
    "QLinearMul": between(node("QLinearMul", ["q", "s", "z", "q", "s", "z", "t", "y"], ["r"], MS)),
    "QLinearConcat": between(node("QLinearConcat", ["t", "y", "q", "s", "z", "q", "s", "z"], ["r"], MS, axis=1)),
    "QLinearAveragePool": between(
        node("QLinearAveragePool", ["q", "s", "z", "t", "y"], ["r"], MS, kernel_shape=[3, 3])
    ),
    "QLinearGlobalAveragePool": between(node("QLinearGlobalAveragePool", ["q", "s", "z", "t", "y"], ["r"], MS)),
    "QLinearSigmoid": between(node("QLinearSigmoid", ["q", "s", "z", "t", "y"], ["r"], MS)),
    "QLinearLeakyRelu": between(node("QLinearLeakyRelu", ["q", "s", "z", "t", "y"], ["r"], MS, alpha=0.2)),
    "QLinearSoftmax": between(
        node("QLinearSoftmax", ["q", "s", "z", "unit", "zero"], ["p"], MS, axis=-1, opset=20),
        node("DequantizeLinear", ["p", "unit", "zero"], ["d"]), node("QuantizeLinear", ["d", "t", "y"], ["r"]),
        unit=f32(1 / 256), zero=np.uint8(0),
    ),
    "QLinearWhere": between(
        node("QLinearWhere", ["cond", "q", "s", "z", "q", "t", "y", "t", "y"], ["r"], MS),
        cond=np.array([True, False, True, False, True, True]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_operators_keep_their_values_within_one_step(name: str, tmp_path: Path) -> None:
    made = QUANTISED[name]
    rewritten = to_qdq(made)
    assert not {found for found in operators(rewritten) if found.startswith("Q") and found != "QuantizeLinear"}
    before, after = outputs(made, tmp_path / "a.onnx"), outputs(rewritten, tmp_path / "b.onnx")
    assert np.abs(before - after).max() <= U8["t"] * 1.001
    assert np.mean(before != after) < 0.02
    assert len(np.unique(before)) > 3


FLOAT_RESULT = {
    "QGemm with float output": model(
        [node("QuantizeLinear", ["image", "s", "z"], ["q"]), FLAT,
         node("QGemm", ["f", "s", "z", "m", "ms", "mz", "c"], ["logits"], MS, transB=1)],
        U8 | GEMM_T | {"c": i32([500, -500, 0, 90, 7])},
    ),
    "MatMulIntegerToFloat": model(
        [node("QuantizeLinear", ["image", "s", "z"], ["q"]),
         node("MatMulIntegerToFloat", ["q", "m", "s", "ms", "z", "mz", "bias"], ["logits"], MS)],
        U8 | GEMM | {"bias": weights(5)},
    ),
    "ConvInteger": model(
        [node("QuantizeLinear", ["image", "s", "z"], ["q"]), node("ConvInteger", ["q", "w", "z", "wzero"], ["sums"]),
         node("Cast", ["sums"], ["cast"], to=1), node("Mul", ["cast", "ws"], ["logits"])],
        U8 | {"w": CONV["w"], "wzero": np.int8(3), "ws": f32(0.001)},
    ),
    "DynamicQuantizeLinear and MatMulInteger": model(
        [node("DynamicQuantizeLinear", ["image"], ["q", "scale", "zero"]),
         node("MatMulInteger", ["q", "m", "zero"], ["sums"]), node("Cast", ["sums"], ["cast"], to=1),
         node("Mul", ["cast", "scale"], ["logits"])],
        {"m": GEMM["m"]},
    ),
    "DynamicQuantizeMatMul": model(
        [node("DynamicQuantizeMatMul", ["image", "m", "ms", "", "bias"], ["logits"], MS)],
        {"m": GEMM["m"], "ms": f32(0.01), "bias": weights(5)},
    ),
    "FusedConv": model(
        [node("FusedConv", ["image", "w", "b", "other"], ["logits"], MS, activation="HardSigmoid",
              activation_params=[0.3, 0.4])],
        {"w": weights(4, 3, 3, 3), "b": weights(4), "other": weights(2, 4, 4, 4)},
    ),
    "FusedGemm": model(
        [node("Flatten", ["image"], ["f"]),
         node("FusedGemm", ["f", "m"], ["logits"], MS, activation="LeakyRelu", activation_alpha=0.3)],
        {"m": weights(108, 5)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOAT_RESULT)
def test_operators_with_float_results_keep_their_values(name: str, tmp_path: Path) -> None:
    made = FLOAT_RESULT[name]
    rewritten = to_qdq(made)
    assert not {item.domain for item in rewritten.graph.node} - {""}
    assert not {found for found in operators(rewritten) if found.endswith("Integer")}
    before, after = outputs(made, tmp_path / "a.onnx"), outputs(rewritten, tmp_path / "b.onnx")
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4 * np.abs(before).max())


def test_the_dynamic_quantiser_takes_every_part_of_its_definition(tmp_path: Path) -> None:
    outputs_of = {"q": (onnx.TensorProto.UINT8, None), "scale": (1, None), "zero": (onnx.TensorProto.UINT8, None)}
    made = model([node("DynamicQuantizeLinear", ["image"], ["q", "scale", "zero"])], {}, outputs=outputs_of)
    found = []
    for graph in (made, to_qdq(made)):
        session = make_session(save(graph, tmp_path / "m.onnx"), optimized=False, threads=1)
        found.append(session.run(None, {"image": IMAGES}))
    for before, after in zip(*found, strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    "stays",
    [
        between(node("QLinearAveragePool", ["q", "s", "z", "t", "y"], ["r"], MS, kernel_shape=[3, 3], channels_last=1)),
        model([node("FusedConv", ["image", "w"], ["logits"], MS, activation="Odd")], {"w": weights(4, 3, 3, 3)}),
        between(
            node("Identity", ["s"], ["computed"]),
            node("QLinearConv", ["q", "computed", "z", "w", "ws", "wz", "t", "y", "b"], ["r"]),
            **CONV, b=i32([1, 2, 3, 4]),
        ),
    ],
    ids=["another layout", "unknown activation", "computed scale"],
)  # fmt: skip
def test_forms_without_a_rewriting_stay(stays: ModelProto) -> None:
    assert operators(to_qdq(stays)) == operators(stays)


def test_float_and_qdq_graphs_stay_as_they_are() -> None:
    made = between(node("Identity", ["q"], ["r"]))
    assert to_qdq(made) == made
