"""The reference networks of the paper: the 8-layer CNN and ResNet-18 in its CIFAR form."""

from __future__ import annotations

import torchvision
from torch import nn


def cnn8(num_classes: int = 10, input_shape: tuple[int, int, int] = (1, 28, 28)) -> nn.Module:
    """The paper's "8-layer CNN": six 3x3 convolutions with stride 2 at every second, two linear layers.

    549,994 parameters for 28x28 grey images and ten classes (Thorsteinsson et al. 2024, table 1).
    """
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    for filters in (32, 64, 128):
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(filters, filters, 3, stride=2, padding=1), nn.ReLU()]
        channels, height, width = filters, (height + 1) // 2, (width + 1) // 2
    layers += [nn.Flatten(), nn.Linear(channels * height * width, 128), nn.ReLU(), nn.Linear(128, num_classes)]
    return nn.Sequential(*layers)


def resnet18(num_classes: int = 10, input_shape: tuple[int, int, int] = (3, 32, 32)) -> nn.Module:
    """ResNet-18 with a 3x3 stem and no max pooling, for images of about 32x32 (He et al. 2016)."""
    network: nn.Module = torchvision.models.resnet18(weights=None, num_classes=num_classes)
    network.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network
