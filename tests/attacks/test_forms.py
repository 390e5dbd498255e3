"""Networks as users write them, which do not bear channels-last images or bfloat16 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.toys import small_network, wrap
from toolkit import progress
from toolkit.artifacts import TorchModel
from toolkit.attacks.forms import FLOAT_FORMS, Form, Precision, first_working
from toolkit.attacks.surrogate import Surrogate
from toolkit.errors import ToolkitError

IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 0, 1, 1, 0])


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, 1, 1)
        self.last = nn.Linear(256, 2)


class Views(Base):
    """Flattens with `view`, as most tutorials do."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        logits: Tensor = self.last(x.view(x.size(0), -1))
        return logits


class MixesFloat(Base):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.tanh(self.first(x).float()).flatten(1))
        return logits


class AddsPositions(Base):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last((self.first(x) + torch.arange(8, device=x.device).float()).flatten(1))
        return logits


class CachesATensor(Base):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.linspace(0, 1, 8)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last((self.first(x) * self.table.to(x.device)).flatten(1))
        return logits


class Spectral(Base):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.fft.fft2(self.first(x)).real.flatten(1))
        return logits


class MixesAndViews(Base):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        logits: Tensor = self.last(x.view(x.size(0), -1).float())
        return logits


class ComplexWeights(Base):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.polar(torch.ones(8), torch.linspace(0, 3, 8)))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last((self.first(x).float() * self.phase).real.flatten(1))
        return logits


class OnlyFloat32(Base):
    """Refuses bfloat16 wherever it comes from."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if x.dtype != torch.float32:
            raise TypeError("float32 is needed")
        logits: Tensor = self.last(x.flatten(1))
        return logits


def a_model(kind: Callable[[], nn.Module]) -> TorchModel:
    torch.manual_seed(0)
    return wrap(kind(), classes=2, shape=(1, 8, 8))


def plain_gradient(model: TorchModel) -> Tensor:
    leaf = IMAGES.clone().requires_grad_(True)
    loss = functional.cross_entropy(model.module(leaf), LABELS, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    ("kind", "asked", "precision", "memory_format"),
    [
        (small_network, "bfloat16", "bfloat16", "channels-last"),
        (small_network, "float32", "float32", "channels-last"),
        (Views, "bfloat16", "bfloat16", "contiguous"),
        (Views, "float32", "float32", "contiguous"),
        (MixesFloat, "bfloat16", "autocast", "channels-last"),
        (AddsPositions, "bfloat16", "autocast", "channels-last"),
        (CachesATensor, "bfloat16", "autocast", "channels-last"),
        (MixesAndViews, "bfloat16", "autocast", "contiguous"),
        (ComplexWeights, "bfloat16", "autocast", "channels-last"),
        (OnlyFloat32, "bfloat16", "float32", "channels-last"),
    ],
)
def test_a_network_computes_in_the_fastest_form_that_it_bears(
    kind: Callable[[], nn.Module],
    asked: Precision,
    precision: str,
    memory_format: str,
    at_once: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = a_model(kind)
    shape = model.spec.input_shape if at_once else None
    surrogate = Surrogate(model.module, model.spec.normalization, asked, input_shape=shape)
    assert (surrogate.precision is not None) == at_once
    gradient = surrogate.gradient(IMAGES, LABELS).cpu()
    assert (surrogate.precision, surrogate.memory_format) == (precision, memory_format)
    cosine = functional.cosine_similarity(gradient.flatten(1), plain_gradient(model).flatten(1))
    assert float(cosine.min()) > 0.98
    lines = capsys.readouterr().err.splitlines()
    fastest = precision == asked and memory_format == "channels-last"
    assert len(lines) == (0 if fastest else 1), lines
    assert fastest or f"{memory_format}: the network does not bear {asked}, channels-last" in lines[0]


def test_a_fourier_transform_computes_where_it_can() -> None:
    model = a_model(Spectral)
    surrogate = Surrogate(model.module, model.spec.normalization, "bfloat16", input_shape=(1, 8, 8))
    assert surrogate.precision in ("autocast", "float32")
    cosine = functional.cosine_similarity(
        surrogate.gradient(IMAGES, LABELS).cpu().flatten(1), plain_gradient(model).flatten(1)
    )
    assert float(cosine.min()) > 0.98


@pytest.mark.parametrize("kind", [MixesFloat, Views, small_network])
@pytest.mark.parametrize("tried_before", [True, False])
def test_refresh_reaches_every_form(kind: Callable[[], nn.Module], tried_before: bool) -> None:
    model = a_model(kind)
    shape = model.spec.input_shape if tried_before else None
    surrogate = Surrogate(model.module, model.spec.normalization, "bfloat16", input_shape=shape)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.mul_(1.5)
    surrogate.refresh(model.module)
    fresh = Surrogate(model.module, model.spec.normalization, "bfloat16")
    assert torch.equal(surrogate.gradient(IMAGES, LABELS), fresh.gradient(IMAGES, LABELS))


def test_a_gradient_that_overflows_in_bfloat16_is_not_used() -> None:
    class Overflows(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x * float("inf") if x.dtype == torch.bfloat16 else x
            logits: Tensor = self.last(x.flatten(1))
            return logits

    model = a_model(Overflows)
    surrogate = Surrogate(model.module, model.spec.normalization, "bfloat16", input_shape=(1, 8, 8))
    assert surrogate.precision == "float32"


def test_the_line_is_silent_under_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    model = a_model(Views)
    progress.set_quiet(True)
    try:
        Surrogate(model.module, model.spec.normalization, input_shape=(1, 8, 8))
    finally:
        progress.set_quiet(False)
    assert capsys.readouterr().err == ""


class NoGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.first(x).detach().flatten(1))
        return logits.round().detach()


class Dictionary(Base):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"logits": self.last(self.first(x).flatten(1))}


@pytest.mark.parametrize(("kind", "words"), [(NoGradient, "does not require grad"), (Dictionary, "'dict'")])
def test_a_network_that_cannot_be_attacked_is_bad_input(kind: Callable[[], nn.Module], words: str) -> None:
    model = a_model(kind)
    with pytest.raises(ToolkitError, match="attacking is not possible") as caught:
        Surrogate(model.module, model.spec.normalization, "bfloat16", input_shape=(1, 8, 8))
    assert words in caught.value.found and "logits alone" in caught.value.fix


def test_memory_that_runs_out_is_no_reason_for_another_form() -> None:
    tried: list[Form] = []

    def attempt(form: Form) -> None:
        tried.append(form)
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        first_working(FLOAT_FORMS, attempt, "attacking")
    assert len(tried) == 1
