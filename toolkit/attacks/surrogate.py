"""The differentiable copy of a network that attacks run on: frozen, channels-last, in bfloat16 where that is fast."""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.allocator import keep_freed_memory
from toolkit.artifacts import Normalization, Normalized
from toolkit.attacks.folding import Pair, fold, write_folded
from toolkit.attacks.forms import ATTACK_FORMS, Form, Precision, first_working

LARGEST = 1e15
"""A gradient is taken for at most that."""
PROBED = 2
"""Images on which a network shows what it bears."""

Loss = Callable[[Tensor], Tensor]
"""Logits float32 [n, classes] to one loss per image [n]; the labels are bound in it."""


@dataclass(frozen=True, slots=True)
class Slope:
    """A loss at some images: its value, its gradient, and the logits that it was computed from."""

    logits: Tensor
    """float32 [n, classes]"""
    loss: Tensor
    """float32 [n]"""
    gradient: Tensor
    """With respect to pixels, float32 [n, C, H, W]."""


def compute_device() -> torch.device:
    """Where training and attacks run: the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: Literal["auto", "float32", "bfloat16"]) -> Precision:
    """`auto` becomes bfloat16 where the hardware computes in it (AVX512-BF16, AMX, recent GPUs), else float32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if platform.machine() not in ("x86_64", "AMD64"):
        return "float32"
    return "bfloat16" if _processor_computes_in_bfloat16() else "float32"


def _processor_computes_in_bfloat16() -> bool:
    capabilities: Callable[[], dict[str, Any]] | None = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        features = capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    older: Callable[[], bool] | None = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return older is not None and bool(older())


def probe_images(input_shape: tuple[int, int, int]) -> Tensor:
    """Two images of noise, always the same, on which a network shows what it bears."""
    return torch.rand((PROBED, *input_shape), generator=torch.Generator().manual_seed(0))


class Surrogate:
    """Gives the gradient of the loss with respect to the image alone, for a network that it never changes.

    It holds a copy: evaluation mode, parameters frozen, channels-last, weights cast once, batch norm folded into
    convolutions. A network that does not bear
    that computes in the fastest form that it does bear; `precision` and `memory_format` say in which. `refresh` brings
    the copy up to the current weights of a network in training.

    Args:
        module: pixels in [0, 1] to logits.
        normalization: the normalisation inside `module`.
        precision: in which the network is to run; normalisation, loss and perturbation stay in float32.
        input_shape: of the images, (channels, height, width), to try the network at once; None: on the first images.

    Raises:
        ToolkitError: the network gives no gradient; without `input_shape`, at the first images.
    """

    def __init__(
        self,
        module: Normalized,
        normalization: Normalization,
        precision: Precision = "float32",
        *,
        input_shape: tuple[int, int, int] | None = None,
    ) -> None:
        self.normalization = normalization
        self.device = compute_device()
        if self.device.type == "cpu":
            keep_freed_memory()
        self._forms = ATTACK_FORMS[precision]
        self._original, self._input_shape = module, input_shape
        copied = copy.deepcopy(module).eval().requires_grad_(False).to(self.device)
        self._mean, self._std = copied.mean.float(), copied.std.float()
        self._network: nn.Module = copied.network
        self._form: Form | None = None
        self._folds: tuple[Pair, ...] = ()
        self._copied = self._list_copied()
        if input_shape is not None:
            self._find_form(probe_images(input_shape).to(self.device))

    @property
    def precision(self) -> Literal["bfloat16", "autocast", "float32"] | None:
        """In which the network really runs; None before it was tried."""
        return None if self._form is None else self._form.precision

    @property
    def memory_format(self) -> Literal["channels-last", "contiguous"] | None:
        """Of the network's images and weights; None before it was tried."""
        return None if self._form is None else self._form.memory_format

    def exact(self) -> Surrogate:
        """The same in float32, of the weights as they are now in the network that this one was made from."""
        if self._forms is ATTACK_FORMS["float32"]:
            return self
        return Surrogate(self._original, self.normalization, "float32", input_shape=self._input_shape)

    def refresh(self, module: Normalized) -> None:
        """Copy the weights and statistics of `module` into this surrogate."""
        current = {**dict(module.network.named_parameters()), **dict(module.network.named_buffers())}
        with torch.no_grad():
            for name, mine in self._copied:
                mine.copy_(current[name])
        write_folded(self._network, module.network, self._folds)

    def _list_copied(self) -> list[tuple[str, Tensor]]:
        """Parameters and buffers that are those of the original, by name."""
        folded = {name for pair in self._folds for name in pair.names(self._network)}
        named = [*self._network.named_parameters(), *self._network.named_buffers()]
        return [(name, value) for name, value in named if name not in folded]

    def gradient(self, images: Tensor, labels: Tensor) -> Tensor:
        """Gradient of the summed cross-entropy with respect to pixels, float32 [n, C, H, W] (Goodfellow et al. 2015).

        Args:
            images: float32 [n, C, H, W]; may lie outside [0, 1].
            labels: int64 [n].
        """
        labels = labels.to(self.device)
        return self.differentiate(images, lambda logits: _cross_entropy(logits, labels)).gradient

    def differentiate(self, images: Tensor, loss: Loss) -> Slope:
        """Any loss per image, its gradient with respect to pixels, and the logits.

        Args:
            images: float32 [n, C, H, W]; may lie outside [0, 1].
            loss: of the logits, one value per image.
        """
        images = images.to(self.device)
        form = self._form or self._find_form(images[:PROBED])
        found = self._differentiate(self._network, form, images, loss)
        # where a derivative is infinite, its sign still tells the way; sums of squares stay finite
        found.gradient.nan_to_num_(0.0, LARGEST, -LARGEST).clamp_(-LARGEST, LARGEST)
        return found

    def logits(self, images: Tensor) -> Tensor:
        """Logits float32 [n, classes] in the surrogate's own precision; decides nothing that is reported."""
        images = images.to(self.device)
        form = self._form or self._find_form(images[:PROBED])
        with torch.inference_mode(), form.context(self.device):
            logits: Tensor = self._network(form.lay_out((images - self._mean) / self._std))
        return logits.float().clone()

    def predict(self, images: Tensor) -> Tensor:
        """The same on the CPU: a surrogate predicts as any graph does, only faster."""
        return self.logits(images).cpu()

    def _differentiate(self, network: nn.Module, form: Form, images: Tensor, loss: Loss) -> Slope:
        leaf = form.lay_out((images - self._mean) / self._std).requires_grad_(True)
        with torch.enable_grad():
            with form.context(self.device):
                logits = network(leaf).float()
            losses = loss(logits)
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        return Slope(logits.detach(), losses.detach(), gradient.float() / self._std)

    def _find_form(self, images: Tensor) -> Form:
        """Bring the network into the first form in which it gives a gradient."""
        labels = torch.zeros(len(images), dtype=torch.int64, device=self.device)

        def attempt(form: Form) -> nn.Module:
            network = form.cast(copy.deepcopy(self._network))
            gradient = self._differentiate(
                network, form, images, lambda logits: _cross_entropy(logits, labels)
            ).gradient
            if form.precision != "float32" and not bool(gradient.isfinite().all()):
                raise FloatingPointError("the gradient is not finite")
            return network

        with torch.no_grad():
            self._network, self._folds = fold(self._network, (images - self._mean) / self._std)
        self._form, self._network = first_working(self._forms, attempt, "attacking")
        self._copied = self._list_copied()
        return self._form


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")
