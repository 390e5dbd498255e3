"""Networks and images on which the outcome of an attack is known, and what attacks are asked to settle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.toys import RGB, linear_model, wrap
from toolkit.artifacts import Normalization, TorchModel
from toolkit.attacks.forms import Precision
from toolkit.attacks.surrogate import Loss, Slope, Surrogate
from toolkit.attacks.survivors import Settle

DUAL_NORM = {"linf": 1, "l2": 2, "l1": torch.inf}
"""Of a hyperplane's weights, whose quotient with the value is the distance."""


@dataclass(frozen=True)
class Hyperplane:
    """A network of two classes that is linear: its margin at an image moved by d is `value` + `weight` · d."""

    model: TorchModel
    images: Tensor
    labels: Tensor
    weight: Tensor
    """Of the margin in pixels, [n, C, H, W]."""
    value: Tensor
    """The margin at the images, below 0, [n]."""

    def surrogate(self, precision: Precision = "float32") -> Surrogate:
        return Surrogate(self.model.module, self.model.spec.normalization, precision)

    def distance(self, norm: str, scale: Tensor) -> Tensor:
        """To the boundary with no pixel range, in units of the ball, [n]."""
        steepness: Tensor = torch.linalg.vector_norm((self.weight * scale).flatten(1), ord=DUAL_NORM[norm], dim=1)
        return -self.value / steepness


def a_hyperplane(count: int = 6, *, side: int = 4, seed: int = 0, normalization: Normalization = RGB) -> Hyperplane:
    """Images in the middle of the pixel range, all rightly classified."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 3 * side * side, generator=generator)
    model = linear_model(weight, (3, side, side), normalization)
    images = torch.rand(count, 3, side, side, generator=generator) * 0.4 + 0.3
    logits = model.predict(images)
    labels = logits.argmax(dim=1)
    sign = torch.where(labels == 0, 1.0, -1.0).view(-1, 1, 1, 1)
    std = torch.tensor(normalization.std).view(1, 3, 1, 1)
    direction = sign * (weight[1] - weight[0]).view(1, 3, side, side) / std
    return Hyperplane(model, images, labels, direction, -(logits[:, 0] - logits[:, 1]).abs())


@dataclass(frozen=True)
class Problem:
    """A small network and images that it takes to be of their labels."""

    model: TorchModel
    images: Tensor
    labels: Tensor

    def surrogate(self, precision: Precision = "float32") -> CountingSurrogate:
        return CountingSurrogate(self.model.module, self.model.spec.normalization, precision)

    def fooled(self, attacked: Tensor) -> Tensor:
        """Which images the network, in float32, gets wrong."""
        return self.model.predict(attacked).argmax(dim=1) != self.labels


def a_problem(count: int = 7, *, classes: int = 5, seed: int = 0) -> Problem:
    """A convolution and a classifier with random weights; 8x8 pixels of three channels, many of them 0 or 1."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, classes))
    model = wrap(network, classes=classes, shape=(3, 8, 8), normalization=RGB)
    images = torch.rand(count, 3, 8, 8).mul(1.6).sub(0.3).clamp(0, 1)
    return Problem(model, images, model.predict(images).argmax(dim=1))


class CountingSurrogate(Surrogate):
    """Counts the images whose gradient was asked for."""

    gradients = 0

    def differentiate(self, images: Tensor, loss: Loss) -> Slope:
        self.gradients += len(images)
        return super().differentiate(images, loss)


class Judge:
    """A settle function that says yes to chosen images, each from its n-th submission on, and notes all that it saw."""

    def __init__(self, yes: set[int], *, after: int = 1) -> None:
        self.yes, self.after = yes, after
        self.seen: dict[int, list[Tensor]] = {}

    def __call__(self, attacked: Tensor, positions: Tensor) -> Tensor:
        for image, position in zip(attacked, positions.tolist(), strict=True):
            self.seen.setdefault(position, []).append(image.clone())
        return torch.tensor([p in self.yes and len(self.seen[p]) >= self.after for p in positions.tolist()])


def never() -> Settle:
    return Judge(set())
