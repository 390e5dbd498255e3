from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.graphs import f32, floats, i64, model, node, save, weights
from toolkit.evaluators.twin.graph import UnconvertibleOperators, read_network
from toolkit.evaluators.twin.network import Entry
from toolkit.evaluators.twin.operators import OPERATORS
from toolkit.exporters.session import make_session

POOL: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2]}
Case = tuple[str, dict[str, Any], list[Any]]
CASES: list[Case] = [
    ("Abs", {}, []), ("Add", {}, [weights(6)]), ("AveragePool", POOL, []),
    ("AveragePool", {**POOL, "pads": [0, 0, 1, 1]}, []), ("AveragePool", {**POOL, "pads": [1, 1, 1, 1]}, []),
    ("AveragePool", {**POOL, "pads": [0, 1, 1, 1], "count_include_pad": 1}, []),
    ("AveragePool", {**POOL, "ceil_mode": 1}, []),
    ("BatchNormalization", {"epsilon": 1e-3}, [*weights(3, 3), floats([0.5, 1, 2])]),
    ("Cast", {"to": 1}, []), ("Ceil", {}, []), ("Celu", {"alpha": 0.7}, []), ("Clip", {}, [f32(-0.3), f32(0.4)]),
    ("Clip", {}, [f32(-0.3)]), ("Concat", {"axis": 1}, [weights(2, 2, 6, 6)]),
    ("Conv", {"pads": [1, 1, 1, 1]}, [weights(4, 3, 3, 3), weights(4)]),
    ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, [weights(4, 3, 3, 3)]),
    ("Conv", {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, [weights(4, 3, 4, 4)]),
    ("Conv", {"pads": [0, 1, 2, 1], "dilations": [2, 1]}, [weights(4, 3, 2, 3)]),
    ("Conv", {"group": 3}, [weights(6, 1, 3, 3)]),
    ("ConvTranspose", {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}, [weights(3, 2, 3, 3)]),
    ("Cos", {}, []), ("DepthToSpace", {"blocksize": 1}, []), ("Div", {}, [f32(3)]), ("Dropout", {}, []),
    ("Einsum", {"equation": "nchw,cd->ndhw"}, [weights(3, 5)]), ("Elu", {"alpha": 0.5}, []), ("Erf", {}, []),
    ("Exp", {}, []), ("Expand", {}, [i64([4, 1, 1, 1, 1])]), ("Flatten", {"axis": -2}, []), ("Floor", {}, []),
    ("Gather", {"axis": 1}, [i64([[2, 0], [-1, 1]])]), ("Gather", {"axis": -1}, [np.int64(2)]),
    ("GatherElements", {"axis": 2}, [i64([0, -1] * 6).reshape(2, 3, 2, 1)]),
    ("Gelu", {}, []), ("Gelu", {"approximate": "tanh"}, []), ("GlobalAveragePool", {}, []), ("GlobalMaxPool", {}, []),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, []), ("HardSwish", {}, []), ("Identity", {}, []),
    ("InstanceNormalization", {"epsilon": 1e-3}, [weights(3), weights(3, seed=1)]),
    ("LRN", {"size": 3, "alpha": 0.1, "bias": 2.0}, []),
    ("LayerNormalization", {"axis": -1}, [weights(6), weights(6, seed=1)]),
    ("LayerNormalization", {"axis": 2}, [weights(6, 6)]), ("LeakyRelu", {"alpha": 0.2}, []),
    ("LogSoftmax", {"axis": 1}, []), ("MatMul", {}, [weights(6, 4)]), ("Max", {}, [f32(0.1), f32(0.2)]),
    ("MaxPool", {**POOL, "pads": [1, 1, 1, 1]}, []), ("MaxPool", {**POOL, "pads": [0, 0, 1, 1]}, []),
    ("MaxPool", {**POOL, "ceil_mode": 1, "dilations": [2, 2], "strides": [1, 1]}, []), ("Mean", {}, [weights(6)]),
    ("Min", {}, [f32(0.1)]), ("Mish", {}, []), ("Mod", {"fmod": 1}, [f32(0.3)]), ("Mul", {}, [weights(6)]),
    ("Neg", {}, []), ("PRelu", {}, [weights(3, 1, 1)]), ("Pad", {}, [i64([0, 0, 1, 2, 0, 0, 0, 1]), f32(0.5)]),
    ("Pad", {"mode": "reflect"}, [i64([0, 0, 1, 2, 0, 0, 0, 1])]), ("Pow", {}, [f32(2)]),
    ("Reciprocal", {}, []), ("ReduceL2", {"keepdims": 0}, [i64([1, 3])]), ("ReduceMax", {}, [i64([-1])]),
    ("ReduceMean", {"keepdims": 0}, [i64([2, 3])]), ("ReduceMean", {}, []), ("ReduceMin", {}, [i64([1])]),
    ("ReduceProd", {"keepdims": 0}, [i64([1, 2])]), ("ReduceSum", {}, [i64([2])]),
    ("ReduceSum", {"noop_with_empty_axes": 1}, []), ("ReduceSumSquare", {}, [i64([2])]), ("Relu", {}, []),
    ("Reshape", {}, [i64([0, -1, 9])]), ("Reshape", {"allowzero": 1}, [i64([-1, 54])]), ("Round", {}, []),
    ("Resize", {"mode": "linear"}, [floats([]), floats([1, 1, 2, 2])]),
    ("Resize", {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
     [floats([]), floats([1, 1, 2, 2])]),
    ("Selu", {}, []), ("Sigmoid", {}, []), ("Sign", {}, []), ("Sin", {}, []),
    ("Slice", {}, [i64([-1, 0]), i64([-100, 4]), i64([2, 3]), i64([-2, 3])]),
    ("Slice", {}, [i64([1]), i64([2**31])]), ("Softmax", {"axis": 2}, []), ("Softplus", {}, []),
    ("Softsign", {}, []), ("SpaceToDepth", {"blocksize": 2}, []), ("Sqrt", {}, []),
    ("Sub", {}, [weights(6)]), ("Sum", {}, [weights(6), weights(6, 1)]), ("Tanh", {}, []),
    ("Tile", {}, [i64([1, 2, 1, 3])]), ("Transpose", {}, []), ("Transpose", {"perm": [0, 2, 3, 1]}, []),
    ("Unsqueeze", {}, [i64([-1, 1])]),
    ("com.microsoft:FastGelu", {}, [weights(6)]), ("com.microsoft:BiasGelu", {}, [weights(6)]),
    ("com.microsoft:Gelu", {}, []), ("com.microsoft:QuickGelu", {"alpha": 1.7}, []),
    ("com.microsoft:FusedMatMul", {"alpha": 0.5, "transB": 1}, [weights(4, 6)]),
]  # fmt: skip


def compare(made: Any, path: Path, images: torch.Tensor) -> None:
    session = make_session(save(made, path), optimized=False, threads=1)
    (wanted,) = session.run(None, {"image": images.numpy()})
    found = read_network(made, Entry("image"), "logits")(images)
    torch.testing.assert_close(found, torch.from_numpy(np.asarray(wanted)), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("name", "attributes", "constants"), CASES, ids=[str(case[0]) for case in CASES])
def test_every_operator_computes_what_onnxruntime_computes(
    name: str, attributes: dict[str, Any], constants: list[Any], tmp_path: Path
) -> None:
    *domain, operator = name.split(":")
    named = {f"c{number}": value for number, value in enumerate(constants)}
    inputs = ["image", *named]
    if operator == "Resize":
        inputs = ["image", "", *list(named)[1:]]
    made = model([node(operator, inputs, ["logits"], "".join(domain), **attributes)], named, shape=(2, 3, 6, 6))
    compare(made, tmp_path / "m.onnx", torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)))


def test_group_normalization_of_either_opset(tmp_path: Path) -> None:
    images = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    group = [node("GroupNormalization", ["image", "s", "b"], ["logits"], num_groups=2)]
    constants = {"s": weights(4), "b": weights(4, seed=1)}
    compare(model(group, constants, shape=(2, 4, 3, 3), opset=21), tmp_path / "m.onnx", images)
    halves = {"s": weights(2), "b": weights(2, seed=1)}
    older = read_network(model(group, halves, shape=(2, 4, 3, 3), opset=18), Entry("image"), "logits")
    scale, bias = (torch.from_numpy(value).repeat_interleave(2) for value in halves.values())
    wanted = torch.nn.functional.group_norm(images, 2, scale, bias)
    torch.testing.assert_close(older(images), wanted)


def test_shapes_are_computed_for_any_batch(tmp_path: Path) -> None:
    """The class token of a vision transformer, and the comparison, selection and ranges of shifted windows."""
    nodes = [
        node("Shape", ["image"], ["shape"], end=1), node("Concat", ["shape", "rest"], ["target"], axis=0),
        node("Expand", ["token", "target"], ["tokens"]), node("Reshape", ["image", "flat"], ["flattened"]),
        node("Concat", ["tokens", "flattened"], ["joined"], axis=1), node("Greater", ["joined", "zero"], ["positive"]),
        node("Not", ["positive"], ["negative"]), node("Where", ["negative", "zero", "joined"], ["selected"]),
        node("Range", ["i0", "i3", "i1"], ["range"]), node("Gather", ["selected", "range"], ["first"], axis=1),
        node("Split", ["first"], ["left", "right"], axis=2, num_outputs=2),
        node("ConstantOfShape", ["two"], ["zeros"]), node("Add", ["left", "zeros"], ["sum"]),
        node("Squeeze", ["sum", "last"], ["squeezed"]),
        node("Cast", ["shape"], ["number"], to=1), node("Div", ["squeezed", "number"], ["logits"]),
    ]  # fmt: skip
    constants = {
        "rest": i64([1, 2]), "token": weights(1, 1, 2), "flat": i64([0, -1, 2]), "zero": f32(0),
        "i0": np.int64(0), "i3": np.int64(3), "i1": np.int64(1), "two": i64([1, 1]), "last": i64([-1]),
    }  # fmt: skip
    made = model(nodes, constants, shape=("N", 1, 2, 4))
    for count in (1, 5):
        compare(made, tmp_path / "m.onnx", torch.randn(count, 1, 2, 4))


def test_old_attribute_forms_are_understood() -> None:
    nodes = [
        node("Pad", ["image"], ["padded"], pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.5),
        node("Slice", ["padded"], ["cut"], starts=[0, 1], ends=[3, 3], axes=[2, 3]),
        node("Clip", ["cut"], ["clipped"], min=-0.2, max=0.7),
        node("Unsqueeze", ["clipped"], ["more"], axes=[0]), node("Squeeze", ["more"], ["less"], axes=[0]),
        node("ReduceSum", ["less"], ["sum"], axes=[3]), node("Split", ["sum"], ["a", "b"], axis=1, split=[1, 2]),
        node("Softmax", ["b"], ["logits"]),
    ]  # fmt: skip
    images = torch.randn(2, 3, 4, 4)
    found = read_network(model(nodes, {}, shape=(2, 3, 4, 4), opset=9), Entry("image"), "logits")(images)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=0.5)
    summed = padded[:, 1:, :3, 1:3].clamp(-0.2, 0.7).sum(3, keepdim=True)
    torch.testing.assert_close(found, summed.flatten(1).softmax(1).reshape(summed.shape))


@pytest.mark.parametrize(
    ("operator", "attributes", "listed"),
    [
        ("Resize", {"mode": "linear", "antialias": 1}, "Resize (linear, half_pixel, antialias=1)"),
        ("ConvTranspose", {"pads": [0, 0, 1, 1]}, "ConvTranspose (asymmetric padding)"),
        ("ConvTranspose", {"auto_pad": "SAME_UPPER"}, "ConvTranspose (automatic padding)"),
        ("AveragePool", {"kernel_shape": [2, 2], "dilations": [2, 2]}, "AveragePool (dilation)"),
        ("DequantizeLinear", {"block_size": 2}, "DequantizeLinear (scales per block)"),
        ("Nonsense", {}, "Nonsense"),
    ],
)
def test_forms_without_a_conversion_are_listed(operator: str, attributes: dict[str, Any], listed: str) -> None:
    made = model([node(operator, ["image", "c"], ["logits"], **attributes)], {"c": f32(1)}, opset=21)
    with pytest.raises(UnconvertibleOperators) as caught:
        read_network(made, Entry("image"), "logits")
    assert caught.value.operators == (listed,)


def test_quantisers_of_other_types_than_integers_are_listed() -> None:
    nodes = [
        node("QuantizeLinear", ["image", "c"], ["q"], output_dtype=17),
        node("DequantizeLinear", ["q", "c"], ["logits"]),
    ]
    with pytest.raises(UnconvertibleOperators) as caught:
        read_network(model(nodes, {"c": f32(1)}, opset=21), Entry("image"), "logits")
    assert caught.value.operators == ("DequantizeLinear (of float8e4m3fn)", "QuantizeLinear (to float8e4m3fn)")


def test_all_missing_operators_are_listed_and_unneeded_ones_are_not() -> None:
    nodes = [
        node("NonZero", ["image"], ["b"]), node("Unknown", ["image"], ["a"], "x.y"), node("Loopy", ["a"], ["logits"]),
    ]  # fmt: skip
    with pytest.raises(UnconvertibleOperators, match=r"^Loopy, x\.y:Unknown$"):
        read_network(model(nodes, {}), Entry("image"), "logits")


def test_masks_move_with_the_network_and_indices_stay_on_the_cpu() -> None:
    nodes = [node("Gather", ["image", "index"], ["few"], axis=1), node("Where", ["mask", "few", "zero"], ["logits"])]
    constants = {"index": i64([2, 0]), "mask": np.array([True, False, True]), "zero": f32(0)}
    network = read_network(model(nodes, constants, shape=("N", 3, 2, 3)), Entry("image"), "logits")
    images = torch.rand(4, 3, 2, 3)
    torch.testing.assert_close(network(images), images[:, [2, 0]] * torch.tensor([1.0, 0, 1]))
    kinds = sorted(str(buffer.dtype) for buffer in network.bfloat16().buffers())
    assert kinds == ["torch.bfloat16", "torch.bool"]


def test_the_registry_is_alphabetical() -> None:
    names = [name for name in OPERATORS if ":" not in name]
    assert names == sorted(names)
