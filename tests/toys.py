"""Small networks and image sets that the tests of several modules share."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from toolkit.artifacts import ModelSpec, Normalization, Normalized, Split, TorchModel
from toolkit.data.images import ArrayImages

GREY = Normalization((0.5,), (0.5,))
RGB = Normalization((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(count))


def wrap(
    network: nn.Module,
    *,
    architecture: str = "toy",
    classes: int = 10,
    shape: tuple[int, int, int] = (1, 28, 28),
    normalization: Normalization = GREY,
) -> TorchModel:
    """`network` as a model in evaluation mode."""
    return TorchModel(
        Normalized(network, normalization).eval(), ModelSpec(architecture, names(classes), shape, normalization)
    )


def linear_model(weight: torch.Tensor, shape: tuple[int, int, int], normalization: Normalization = GREY) -> TorchModel:
    """Logits `weight @ pixels` of the normalised image, weight [classes, C*H*W]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return wrap(nn.Sequential(nn.Flatten(), layer), classes=weight.shape[0], shape=shape, normalization=normalization)


def halves(count: int, *, seed: int = 0, side: int = 8) -> Split:
    """Images that are brighter on the left (class 0) or on the right (class 1): separable, with a wide margin."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    array = rng.integers(0, 60, (count, 1, side, side), dtype=np.uint8)
    for image, label in zip(array, labels, strict=True):
        image[:, :, label * side // 2 : (label + 1) * side // 2] += 150
    return Split(ArrayImages("halves", ("left", "right"), array, labels), np.arange(count, dtype=np.int64))


def small_network(*, batch_norm: bool = False) -> nn.Sequential:
    """One convolution and a classifier of two classes, for 8x8 grey images."""
    norm = [nn.BatchNorm2d(6)] if batch_norm else []
    return nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), *norm, nn.ReLU(), nn.Flatten(), nn.Linear(96, 2))
