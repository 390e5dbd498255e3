"""Networks for telephones that a small machine can train on Fashion-MNIST: `toolkit train mobile.py:NAME`.

All end in 10 classes and take images of one channel, 28x28: the first convolution keeps that size.
"""

from __future__ import annotations

from functools import partial

import torchvision
from torch import nn
from torchvision.models.efficientnet import EfficientNet, MBConvConfig

WIDTHS = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (64, 1))
"""Output channels and stride of every block of `depthwise`."""
CLASSES = 10


def depthwise() -> nn.Module:
    """Depthwise separable convolutions (Howard et al. 2017) with ReLU, which lets channels be scaled, for ReLU6."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for width, stride in WIDTHS:
        layers += [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)]
        layers += [nn.ReLU(), nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def mobilenet_v3_small() -> nn.Module:
    """torchvision's MobileNetV3-small (Howard et al. 2019), whole but for the first convolution."""
    return _for_small_images(torchvision.models.mobilenet_v3_small(num_classes=CLASSES))


def efficientnet() -> nn.Module:
    """EfficientNet-B0's seven stages (Tan and Le 2019) by torchvision, of half its depth and a third of its width."""
    block = partial(MBConvConfig, width_mult=1 / 3, depth_mult=0.5)
    stages = [
        block(1, 3, 1, 32, 16, 1),
        block(6, 3, 2, 16, 24, 2),
        block(6, 5, 2, 24, 40, 2),
        block(6, 3, 2, 40, 80, 3),
        block(6, 5, 1, 80, 112, 3),
        block(6, 5, 1, 112, 192, 4),
        block(6, 3, 1, 192, 320, 1),
    ]
    return _for_small_images(EfficientNet(stages, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES))


def _for_small_images(network: nn.Module) -> nn.Module:
    """Another first convolution, for one channel and with a stride of 1."""
    name = "features.0.0"
    first = network.get_submodule(name)
    assert isinstance(first, nn.Conv2d)
    network.set_submodule(name, nn.Conv2d(1, first.out_channels, 3, padding=1, bias=False))
    return network
