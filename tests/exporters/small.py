"""Small networks and image sets for the tests of the exporters."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from toolkit.artifacts import (
    HashArray,
    Int64Array,
    ModelSpec,
    Normalization,
    Normalized,
    Split,
    TorchModel,
    UInt8Array,
)

GREY = Normalization((0.5,), (0.5,))
CIFAR = Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))


class Pictures:
    """An image set in memory that remembers the largest number of images asked for at once."""

    def __init__(self, pixels: UInt8Array) -> None:
        self.array = pixels
        self.name = "pictures"
        self.class_names = ("a", "b", "c")
        self.largest_request = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.array.shape[1:]
        return channels, height, width

    @property
    def labels(self) -> Int64Array:
        return np.zeros(len(self.array), dtype=np.int64)

    @property
    def hashes(self) -> HashArray:
        digests = [hashlib.sha256(image.tobytes()).digest()[:8] for image in self.array]
        return np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)

    def pixels(self, indices: Int64Array) -> UInt8Array:
        self.largest_request = max(self.largest_request, len(indices))
        return self.array[indices]


def pictures(count: int, shape: tuple[int, int, int], seed: int = 0) -> Split:
    """Random images with the whole range of pixels in each."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return Split(Pictures(pixels), np.arange(count, dtype=np.int64))


def wrap(network: nn.Module, shape: tuple[int, int, int], normalization: Normalization | None = None) -> TorchModel:
    """A `TorchModel` of three classes (the count is not checked by the exporters)."""
    chosen = normalization or (GREY if shape[0] == 1 else CIFAR)
    return TorchModel(Normalized(network, chosen), ModelSpec("test", ("a", "b", "c"), shape, chosen))


def tiny(channels: int = 1, filters: int = 4) -> nn.Module:
    """One padded convolution, ReLU, one linear layer; for images of 8x8."""
    torch.manual_seed(3)
    convolution = nn.Conv2d(channels, filters, 3, padding=1, stride=2)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(filters * 16, 3))


def lively(model: TorchModel, images: torch.Tensor) -> TorchModel:
    """Settle batch norms and scale the last layer so that the logits' standard deviation is 1."""
    module = model.module.train()
    with torch.no_grad():
        for _ in range(5):
            module(images)
        module.eval()
        last = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)][-1]
        last.weight.normal_(0, 0.1)
        last.weight /= module(images).std()
    return model


def onnx_file(path: Path, nodes: list[onnx.NodeProto], shape: list[int | str], **constants: object) -> Path:
    """An ONNX file that turns `image` into `logits` by `nodes`."""
    values = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        values,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
