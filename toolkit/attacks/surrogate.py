"""The differentiable copy of a network that attacks run on: frozen, channels-last, in bfloat16 where that is fast."""

from __future__ import annotations

import copy
import platform
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from toolkit.allocator import keep_freed_memory
from toolkit.artifacts import Normalization, Normalized

Precision = Literal["float32", "bfloat16"]


def compute_device() -> torch.device:
    """Where training and attacks run: the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: Literal["auto", "float32", "bfloat16"]) -> Precision:
    """`auto` becomes bfloat16 where the hardware computes in it (AVX512-BF16, AMX, recent GPUs), else float32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    if platform.machine() not in ("x86_64", "AMD64"):
        return "float32"
    features = torch.cpu.get_capabilities()
    return "bfloat16" if features.get("avx512_bf16") or features.get("amx_bf16") else "float32"


class Surrogate:
    """Gives the gradient of the loss with respect to the image alone, for a network that it never changes.

    It holds a copy: evaluation mode, parameters frozen, channels-last, weights cast once. `refresh` brings the copy up
    to the current weights of a network in training.

    Args:
        module: pixels in [0, 1] to logits.
        normalization: the normalisation inside `module`.
        precision: in which the network runs; normalisation, loss and perturbation stay in float32.
    """

    def __init__(self, module: Normalized, normalization: Normalization, precision: Precision = "float32") -> None:
        self.normalization = normalization
        self.device = compute_device()
        if self.device.type == "cpu":
            keep_freed_memory()
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        copied = copy.deepcopy(module).eval().requires_grad_(False).to(self.device)
        self._mean, self._std = copied.mean.float(), copied.std.float()
        self._network = copied.network.to(dtype=self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._pairs = [*self._network.named_parameters(), *self._network.named_buffers()]

    def refresh(self, module: Normalized) -> None:
        """Copy the weights and statistics of `module` into this surrogate."""
        current = {**dict(module.network.named_parameters()), **dict(module.network.named_buffers())}
        with torch.no_grad():
            for name, mine in self._pairs:
                mine.copy_(current[name])

    def network_input(self, images: Tensor) -> Tensor:
        """Normalised images in the network's precision and memory format."""
        normalised = (images - self._mean) / self._std
        return normalised.to(dtype=self._dtype, memory_format=torch.channels_last)

    def gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Gradient of the summed cross-entropy with respect to pixels, float32 [n, C, H, W] (Goodfellow et al. 2015).

        Args:
            images: float32 [n, C, H, W]; may lie outside [0, 1].
            labels: int64 [n].
        """
        leaf = self.network_input(images).requires_grad_(True)
        with torch.enable_grad():
            loss = functional.cross_entropy(self._network(leaf).float(), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient.float() / self._std
