"""A small network of depthwise separable convolutions (Howard et al. 2017): `toolkit train depthwise.py:network`."""

from __future__ import annotations

from torch import nn

WIDTHS = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (64, 1))
"""Output channels and stride of every block."""


def network() -> nn.Module:
    """For 10 classes of 28x28 images with one channel; ReLU, which lets channels be scaled, in place of ReLU6."""
    layers: list[nn.Module] = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    channels = 16
    for width, stride in WIDTHS:
        layers += [nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels)]
        layers += [nn.ReLU(), nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
