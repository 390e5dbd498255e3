"""The nouns that pass between stages: images, splits, models, proportions."""

from __future__ import annotations

import copy
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal distribution."""

UInt8Array = npt.NDArray[np.uint8]
Int64Array = npt.NDArray[np.int64]
HashArray = npt.NDArray[np.uint64]


def derive_seed(*parts: int) -> int:
    """One 32-bit seed from several numbers (say: seed, epoch, step), so that no generator's state has to be kept."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@dataclass(frozen=True, slots=True)
class Proportion:
    """A share with its count: `correct` of `total`, and its 95 % Wilson score interval (Wilson 1927)."""

    correct: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.total or self.total < 1:
            raise ValueError(f"no proportion: {self.correct} of {self.total}")

    @property
    def value(self) -> float:
        return self.correct / self.total

    @property
    def low(self) -> float:
        return self._bound(-1)

    @property
    def high(self) -> float:
        return self._bound(+1)

    def _bound(self, sign: int) -> float:
        n, p = self.total, self.value
        centre = p + Z_95**2 / (2 * n)
        spread = Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
        return min(1.0, max(0.0, (centre + sign * spread) / (1 + Z_95**2 / n)))

    def as_dict(self) -> dict[str, float | int]:
        return {"correct": self.correct, "total": self.total, "value": self.value, "low": self.low, "high": self.high}

    def __str__(self) -> str:
        return f"{self.value:.2%} [{self.low:.2%}, {self.high:.2%}] n={self.total}"

    @classmethod
    def of(cls, flags: Tensor) -> Proportion:
        """The share of True in a boolean tensor."""
        return cls(int(flags.sum()), flags.numel())


MAX_BATCH = 256
MAX_BATCH_PIXELS = 2**21


def evaluation_batch(shape: tuple[int, int, int]) -> int:
    """Images of `shape` to attack or score at a time: memory is bounded for large images, caches are used for small."""
    return max(8, min(MAX_BATCH, MAX_BATCH_PIXELS // math.prod(shape)))


class ImageSet(Protocol):
    """Labelled images, in memory or streamed from disk; pixels are 0 to 255."""

    @property
    def name(self) -> str: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        ...

    @property
    def labels(self) -> Int64Array: ...
    @property
    def hashes(self) -> HashArray:
        """Each image's 64-bit BLAKE2b hash; equal images have equal hashes."""
        ...

    def pixels(self, indices: Int64Array) -> UInt8Array:
        """The images at `indices`, uint8 [n, C, H, W]."""
        ...


@dataclass(frozen=True, slots=True)
class Batch:
    """Images float32 [n, C, H, W] in [0, 1] and labels int64 [n]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """A part of an image set that serves one purpose."""

    images: ImageSet
    indices: Int64Array

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Int64Array:
        return self.images.labels[self.indices]

    @property
    def hashes(self) -> HashArray:
        return self.images.hashes[self.indices]

    @property
    def digest(self) -> str:
        """SHA-256 over the sorted image hashes: names the set of images, whatever their order."""
        return hashlib.sha256(np.sort(self.hashes).astype("<u8").tobytes()).hexdigest()

    @property
    def labelled_digest(self) -> str:
        """The same of the images with their labels: names what is learnt from them, or how they judge."""
        hashes, labels = self.hashes, self.labels
        order = np.lexsort((labels, hashes))
        parts = [values[order].astype("<u8").tobytes() for values in (hashes, labels)]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    @property
    def ordered_digest(self) -> str:
        """The same in the order in which they stand, which decides the batches of a training."""
        parts = [values.astype("<u8").tobytes() for values in (self.hashes, self.labels)]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def take(self, indices: Int64Array) -> Batch:
        """The images at positions `indices` of this split."""
        chosen = self.indices[indices]
        images = torch.from_numpy(self.images.pixels(chosen)).to(torch.float32).div_(255.0)
        return Batch(images, torch.from_numpy(self.images.labels[chosen]))

    def batches(self, size: int | None = None) -> Iterator[Batch]:
        """All images in order, `size` at a time (None: as many as memory allows); the last batch may be smaller."""
        size = size or evaluation_batch(self.images.shape)
        for start in range(0, len(self), size):
            yield self.take(np.arange(start, min(start + size, len(self)), dtype=np.int64))

    def first(self, count: int) -> Split:
        """The first `count` images of this split (all, if it has fewer)."""
        return replace(self, indices=self.indices[:count])


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of one data set."""

    train: Split
    calibration: Split
    validation: Split
    evaluation: Split
    dropped: int = 0
    """Images left out of training because an identical one stands in another part."""

    def record(self) -> dict[str, Any]:
        """Count and digest of every part, for the manifest."""
        parts = {name: getattr(self, name) for name in ("train", "calibration", "validation", "evaluation")}
        found = {name: {"images": len(part), "sha256": part.digest} for name, part in parts.items()}
        return {**found, "dropped_duplicates": self.dropped}


@dataclass(frozen=True, slots=True)
class Normalization:
    """Per-channel mean and standard deviation of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Normalized(nn.Module):
    """A network with its normalisation inside: pixels float32 [n, C, H, W] in [0, 1] to logits [n, classes]."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, normalization: Normalization) -> None:
        super().__init__()
        self.network = network
        shape = (1, len(normalization.mean), 1, 1)
        self.register_buffer("mean", torch.tensor(normalization.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(normalization.std).view(shape), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.network((image - self.mean) / self.std)
        return logits


@dataclass(frozen=True)
class ModelSpec:
    """What rebuilds a network and says where it comes from; everything in it is plain JSON data."""

    architecture: str
    """`cnn8`, `resnet18`, `torchvision:NAME` or `path/to/file.py:callable`."""
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    """(channels, height, width)"""
    normalization: Normalization
    dataset: str | None = None
    """The data source's own words (`fashion-mnist`, `folder:DIR`, ...)."""
    pruning: tuple[Mapping[str, Any], ...] = ()
    """One entry per pruning, each with torch-pruning's history; replayed in order on loading."""
    training: tuple[Mapping[str, Any], ...] = ()
    """One entry per training: objective, epochs, seed, images' digest, results."""


@dataclass(frozen=True)
class TorchModel:
    """A classifier with gradients. Stages never change the one they are given: they copy first."""

    module: Normalized
    spec: ModelSpec
    training_hashes: HashArray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))
    """Hashes of all images that its weights were ever trained on."""

    @property
    def network(self) -> nn.Module:
        return self.module.network

    def copy(self) -> TorchModel:
        return replace(self, module=copy.deepcopy(self.module))

    def predict(self, images: Tensor) -> Tensor:
        """Logits float32 [n, classes] of images float32 [n, C, H, W] in [0, 1], in float32 and evaluation mode.

        Computes where the module is, and returns to the CPU.
        """
        was_training = self.module.training
        self.module.eval()
        try:
            with torch.inference_mode():
                logits: Tensor = self.module(images.to(self.module.mean.device))
        finally:
            self.module.train(was_training)
        return logits.float().cpu()


def weights_digest(network: nn.Module) -> str:
    """SHA-256 over all parameters and buffers, bit by bit."""
    return state_digest(network.state_dict())


def versioned(state: Mapping[str, Tensor], network: nn.Module) -> Mapping[str, Tensor]:
    """`state`, whose names are those of `network`, with its modules' versions, which plain dictionaries lose."""
    found = OrderedDict(state)
    found._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]  # as torch keeps them
    return found


def state_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the values of a state dict, bit by bit."""
    digest = hashlib.sha256()
    for value in state.values():
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Predictor(Protocol):
    """Anything that gives logits, without gradients: an ONNX Runtime session, a torch model."""

    def predict(self, images: Tensor) -> Tensor:
        """Logits float32 [n, classes] of images float32 [n, C, H, W] in [0, 1]."""
        ...


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """An ONNX classifier file: input `image` float32 [N, C, H, W] in [0, 1], output `logits` [N, classes]."""

    path: Path
    role: Literal["fp32", "deployed"]
