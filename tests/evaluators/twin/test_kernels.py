"""Where integers are decided by how the runtime's kernels round: plain quantised files, met to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch.nn import functional

from tests.graphs import f32, model, node, save, weights
from toolkit.evaluators.surrogate import build_twin
from toolkit.evaluators.twin.float_kernel import FloatKernel
from toolkit.evaluators.twin.normalisation import with_kernel_rounding
from toolkit.evaluators.twin.softmax import SoftmaxKernel
from toolkit.exporters.onnx import load_onnx
from toolkit.exporters.optimised import layers_in_float
from toolkit.exporters.session import OnnxPredictor

pytestmark = pytest.mark.usefixtures("quiet")
SIDE, CHANNELS = 16, 32


class Images(CalibrationDataReader):  # type: ignore[misc]  # it has no types
    def __init__(self, images: torch.Tensor) -> None:
        self._parts = iter(torch.split(images, 8))

    def get_next(self) -> dict[str, Any] | None:
        part = next(self._parts, None)
        return None if part is None else {"image": part.numpy()}


def residual(path: Path, group: int) -> Path:
    """Residual blocks: with int8 activations, the runtime has no integer kernel for what two layers read."""
    kernel: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    nodes = [node("Conv", ["image", "w0", "b"], ["c0"], **kernel), node("Relu", ["c0"], ["r0"])]
    for number in range(1, 5):
        before = f"r{number - 1}"
        nodes += [
            node("Conv", [before, f"w{number}", "b"], [f"c{number}"], group=group, **kernel),
            node("Relu", [f"c{number}"], [f"a{number}"]),
            node("Add", [f"a{number}", before], [f"r{number}"]),
        ]
    nodes += [
        node("GlobalAveragePool", ["r4"], ["pooled"]),
        node("Flatten", ["pooled"], ["flat"]),
        node("Gemm", ["flat", "head"], ["logits"]),
    ]
    constants = {
        f"w{number}": weights(CHANNELS, CHANNELS // group if number else 3, 3, 3, seed=number) / (1 if group > 1 else 4)
        for number in range(5)
    }
    constants |= {"b": weights(CHANNELS, seed=8), "head": weights(CHANNELS, 5, seed=9)}
    return save(model(nodes, constants, shape=("N", 3, SIDE, SIDE)), path)


@pytest.mark.parametrize("group", [1, 4, CHANNELS])
def test_plain_quantised_files_with_convolutions_in_float_are_met_to_the_last_bit(group: int, tmp_path: Path) -> None:
    images = torch.rand(48, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "q.onnx"
    quantize_static(residual(tmp_path / "f.onnx", group), path, Images(images[:16]))  # int8, per tensor, QDQ
    assert layers_in_float(path, load_onnx(path))
    twin, predictor = build_twin(path), OnnxPredictor(path, threads=1)
    wanted = predictor.predict(images)
    assert wanted.std() > 0.01
    torch.testing.assert_close(twin.predict(images), wanted, rtol=0, atol=0)
    last = images.to(memory_format=torch.channels_last).requires_grad_()
    twin.module(last)[:, 0].sum().backward()  # the memory format of attacks
    assert last.grad is not None and last.grad.abs().sum() > 0


def test_float_graphs_and_graphs_of_integer_kernels_have_no_layers_in_float(tmp_path: Path) -> None:
    path = residual(tmp_path / "f.onnx", 1)
    assert layers_in_float(path, load_onnx(path)) == frozenset()
    broken = model([node("QuantizeLinear", ["image", "s"], ["q"]), node("Conv", ["q", "q"], ["logits"])], {"s": f32(1)})
    assert layers_in_float(save(broken, tmp_path / "broken.onnx"), broken) == frozenset()


@pytest.mark.parametrize(("group", "stride", "dilation"), [(1, 1, 1), (2, 2, 1), (4, 1, 2), (8, 2, 1)])
def test_the_float_kernel_computes_the_convolution(group: int, stride: int, dilation: int) -> None:
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(-128, 128, (2, 8, 9, 7), generator=draw).float()
    weight, bias = torch.randn(8, 8 // group, 3, 3, generator=draw), torch.randn(8, generator=draw)
    wanted = functional.conv2d(image * 0.1, weight, bias, stride, dilation, dilation, group)
    steps, reach, edge = [stride] * 2, [dilation] * 2, [dilation] * 2
    kernel = FloatKernel(image, torch.tensor(0.1), weight, bias, edge, steps, reach, group, tuple(wanted.shape))
    places = torch.ones_like(wanted).nonzero(as_tuple=True)
    torch.testing.assert_close(kernel.at(places), wanted.flatten(), rtol=1e-5, atol=1e-4)


def test_shares_of_integers_are_cut_to_a_whole_inverse_scale() -> None:
    integers = torch.tensor([[0.0, 10.0, 20.0], [-128.0, 127.0, 127.0]])
    found = SoftmaxKernel(integers, torch.tensor(0.1), -1).positions(torch.tensor(1 / 255.9))
    torch.testing.assert_close(found, torch.softmax(integers * 0.1, -1) * 255, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [32, 96])
def test_layer_normalisation_has_the_bits_of_the_runtime(width: int, tmp_path: Path) -> None:
    scale, shift = 1 + weights(width), weights(width, seed=1)
    nodes = [
        node("Flatten", ["image"], ["flat"]),
        node("LayerNormalization", ["flat", "scale", "shift"], ["logits"], epsilon=1e-6),
    ]
    path = save(model(nodes, {"scale": scale, "shift": shift}, shape=("N", 1, 1, width)), tmp_path / "n.onnx")
    images = torch.rand(64, 1, 1, width, generator=torch.Generator().manual_seed(0))
    rows = images.flatten(1).requires_grad_()
    factors = torch.from_numpy(scale), torch.from_numpy(shift)
    smooth = functional.layer_norm(rows, [width], *factors, 1e-6)
    found = with_kernel_rounding(smooth, rows, *factors, 1e-6)
    torch.testing.assert_close(found, OnnxPredictor(path, threads=1).predict(images), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(found.square().sum(), rows, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(smooth.square().sum(), rows)[0], rtol=1e-4, atol=1e-4)
    half = smooth.bfloat16()
    assert with_kernel_rounding(half, rows.bfloat16(), *factors, 1e-6) is half


def attention(path: Path) -> Path:
    """One head: the weights of a softmax, quantised, times what they weigh."""
    nodes = [
        node("Reshape", ["image", "shape"], ["tokens"]),
        node("MatMul", ["tokens", "w"], ["keys"]),
        node("Transpose", ["keys"], ["turned"], perm=[0, 2, 1]),
        node("MatMul", ["keys", "turned"], ["scores"]),
        node("Softmax", ["scores"], ["shares"], axis=-1),
        node("MatMul", ["shares", "keys"], ["mixed"]),
        node("Flatten", ["mixed"], ["flat"]),
        node("Gemm", ["flat", "head"], ["logits"]),
    ]
    constants = {
        "shape": np.array([-1, SIDE, 3 * SIDE], np.int64), "w": weights(3 * SIDE, 8), "head": weights(8 * SIDE, 5),
    }  # fmt: skip
    return save(model(nodes, constants, shape=("N", 3, SIDE, SIDE)), path)


def test_a_quantised_softmax_is_met(tmp_path: Path) -> None:
    images = torch.rand(48, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "q.onnx"
    quantize_static(attention(tmp_path / "f.onnx"), path, Images(images[:16]))
    twin, predictor = build_twin(path), OnnxPredictor(path, threads=1)
    wanted = predictor.predict(images)
    assert wanted.std() > 0.01
    assert ((twin.predict(images) - wanted).abs() > 1e-6).float().mean() < 0.02
