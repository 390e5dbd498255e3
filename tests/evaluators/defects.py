"""Networks with a planted defect, each of which spoils a robustness figure in one known way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import helper
from torch import Tensor, nn

from tests.evaluators.greys import PLAIN, SIDE
from tests.exporters.small import onnx_file
from tests.toys import wrap
from toolkit.artifacts import Split, TorchModel


class OfMean(nn.Module):
    """Margin for `bright` as a function of the mean pixel, differentiable wherever the function is."""

    def __init__(self, margin: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, image: Tensor) -> Tensor:
        found = self.margin(image.mean(dim=(1, 2, 3)))
        return torch.stack([-found, found], dim=1)


class _Backward(torch.autograd.Function):
    """The identity, whose gradient is changed on its way back."""

    @staticmethod
    def forward(context: Any, values: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        context.change = change
        return values.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return context.change(gradients[0]), None


class Misled(nn.Module):
    """A threshold in the middle whose answers are sound and whose gradients are not."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change
        self.inner = OfMean(lambda mean: mean - 0.5)

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.inner(_Backward.apply(image, self.change))
        return found


def in_one_pixel(gradient: Tensor) -> Tensor:
    """Masked: an attack that follows it moves the mean by a sixteenth of what it could."""
    kept = torch.zeros_like(gradient)
    kept[..., 0, 0] = gradient[..., 0, 0]
    return kept


class InTraining:
    """A predictor whose network was left in training mode."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.train()

    def predict(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.network(images)
        return found


class Knows:
    """It looks the label up by the image's position, so no attack changes its answer."""

    def __init__(self, split: Split) -> None:
        self.labels = torch.from_numpy(split.labels)

    def predict(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(self.labels, 2).float()[: len(images)]


def of_mean(margin: Callable[[Tensor], Tensor]) -> TorchModel:
    return wrap(OfMean(margin), classes=2, shape=(1, SIDE, SIDE), normalization=PLAIN)


def misled(change: Callable[[Tensor], Tensor]) -> TorchModel:
    return wrap(Misled(change), classes=2, shape=(1, SIDE, SIDE), normalization=PLAIN)


def threshold_file(path: Path, at: float = 0.5, *, quantised: bool = False) -> Path:
    """An ONNX file that says bright above `at`; quantised: behind a quantiser of pixels in [0, 0.8]."""
    weight = np.stack([-np.ones(SIDE * SIDE), np.ones(SIDE * SIDE)]).astype(np.float32) / SIDE**2
    constants: dict[str, object] = {"weight": weight, "bias": np.array([at, -at], np.float32)}
    nodes = []
    if quantised:
        constants |= {"scale": np.float32(0.8 / 255), "zero": np.uint8(0)}
        nodes += [
            helper.make_node("QuantizeLinear", ["image", "scale", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["pixels"]),
        ]
    nodes += [
        helper.make_node("Flatten", ["pixels" if quantised else "image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"], transB=1),
    ]
    return onnx_file(path, nodes, ["N", 1, SIDE, SIDE], **constants)
