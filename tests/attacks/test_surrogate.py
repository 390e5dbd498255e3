from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.toys import GREY, RGB, small_network, wrap
from toolkit.artifacts import TorchModel
from toolkit.attacks.forms import Precision
from toolkit.attacks.surrogate import Surrogate, resolve_precision
from toolkit.models.networks import cnn8, resnet18

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.tensor([1, 0, 3, 9])


def reference(architecture: str) -> TorchModel:
    torch.manual_seed(0)
    if architecture == "cnn8":
        model = wrap(cnn8(10, (1, 12, 12)), shape=(1, 12, 12))
    else:
        model = wrap(resnet18(10, (3, 16, 16)), shape=(3, 16, 16), normalization=RGB)
    return model


def images_for(model: TorchModel) -> Tensor:
    return torch.rand(4, *model.spec.input_shape, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1


def plain_gradient(model: TorchModel, images: Tensor) -> Tensor:
    """What autograd gives on the plain module."""
    leaf = images.clone().requires_grad_(True)
    loss = functional.cross_entropy(model.module(leaf), LABELS, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("architecture", ["cnn8", "resnet18"])
def test_the_gradient_is_autograds(architecture: str) -> None:
    model = reference(architecture)
    images = images_for(model)
    gradient = Surrogate(model.module, model.spec.normalization).gradient(images, LABELS).cpu()
    expected = plain_gradient(model, images)
    assert gradient.dtype == torch.float32 and gradient.shape == images.shape
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


# rounding turns some ReLUs of a deep network with random weights, so its bound is lower
@pytest.mark.parametrize(("architecture", "cosine_bound"), [("cnn8", 0.99), ("resnet18", 0.95)])
def test_the_gradient_in_bfloat16_points_the_same_way(architecture: str, cosine_bound: float) -> None:
    model = reference(architecture)
    images = images_for(model)
    gradient = Surrogate(model.module, model.spec.normalization, "bfloat16").gradient(images, LABELS).cpu()
    cosine = functional.cosine_similarity(gradient.flatten(1), plain_gradient(model, images).flatten(1))
    assert gradient.dtype == torch.float32 and float(cosine.min()) > cosine_bound


def test_the_gradient_matches_finite_differences() -> None:
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 10)), shape=(3, 2, 2))
    model = wrap(model.network, shape=(3, 2, 2), normalization=RGB)
    images = images_for(model)
    gradient = Surrogate(model.module, RGB).gradient(images, LABELS).cpu()
    exact = copy.deepcopy(model.module).double()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).double()

    def loss(step: float) -> float:
        logits = exact(images.double() + step * direction)
        return functional.cross_entropy(logits, LABELS, reduction="sum").item()

    assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_callers_module_is_never_changed(precision: Precision) -> None:
    model = wrap(small_network(batch_norm=True), classes=2, shape=(1, 8, 8))
    model.module.train()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    surrogate = Surrogate(model.module, model.spec.normalization, precision)
    surrogate.gradient(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0]))
    after = model.module.state_dict()
    assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items())
    assert model.module.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.module.parameters())
    assert not any(value.requires_grad for _, value in surrogate._copied), "the surrogate's own weights are frozen"


def test_batch_norm_runs_in_evaluation_mode() -> None:
    model = wrap(small_network(batch_norm=True), classes=2, shape=(1, 8, 8))
    model.module.train()
    surrogate = Surrogate(model.module, model.spec.normalization)
    images, labels = torch.rand(4, 1, 8, 8, generator=GENERATOR), torch.tensor([0, 1, 1, 0])
    whole = surrogate.gradient(images, labels)
    assert torch.allclose(whole[:1], surrogate.gradient(images[:1], labels[:1]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_refresh_follows_a_network_in_training(precision: Precision) -> None:
    model = wrap(small_network(batch_norm=True), classes=2, shape=(1, 8, 8))
    surrogate = Surrogate(model.module, model.spec.normalization, precision)
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0])
    before = surrogate.gradient(images, labels)
    model.module.train()(images)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.1)
    assert torch.equal(surrogate.gradient(images, labels), before)
    surrogate.refresh(model.module)
    after = surrogate.gradient(images, labels)
    fresh = Surrogate(model.module, model.spec.normalization, precision)
    assert torch.equal(after, fresh.gradient(images, labels)) and not torch.equal(after, before)


def test_gradients_of_confident_images_do_not_vanish_in_sum() -> None:
    # summed, not averaged: an image's gradient does not depend on how many others are in its batch
    model = reference("cnn8")
    surrogate = Surrogate(model.module, model.spec.normalization)
    images = images_for(model)
    alone = surrogate.gradient(images[:1], LABELS[:1])
    assert torch.allclose(surrogate.gradient(images, LABELS)[:1], alone, rtol=1e-3, atol=1e-6)


def test_inference_tensors_can_be_attacked() -> None:
    model = reference("cnn8")
    with torch.inference_mode():
        images = images_for(model)
    surrogate = Surrogate(model.module, model.spec.normalization)
    with torch.no_grad():
        assert float(surrogate.gradient(images, LABELS).abs().max()) > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_precision_that_is_asked_for_is_taken(
    monkeypatch: pytest.MonkeyPatch, precision: Literal["float32", "bfloat16"]
) -> None:
    """Also where the hardware would have it otherwise, and down to what the network's first layer is given."""
    hardware = {"avx512_bf16": precision == "float32"}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: hardware)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_precision("auto") != precision and resolve_precision(precision) == precision
    seen: list[torch.dtype] = []

    class Spy(nn.Identity):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(input.dtype)
            return input

    network = nn.Sequential(Spy(), *small_network())
    model = wrap(network, classes=2, shape=(1, 8, 8))
    surrogate = Surrogate(model.module, model.spec.normalization, resolve_precision(precision))
    surrogate.gradient(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0]))
    assert surrogate.precision == precision and surrogate.memory_format == "channels-last"
    assert set(seen) == {torch.bfloat16 if precision == "bfloat16" else torch.float32}


@pytest.mark.parametrize(("features", "expected"), [({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")])
def test_auto_takes_bfloat16_where_the_processor_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: features)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert resolve_precision("auto") == expected
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert resolve_precision("auto") == "float32"


def test_auto_on_a_gpu_asks_for_bfloat16_in_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older GPUs emulate bfloat16, slower than float32."""

    in_hardware = False

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or in_hardware

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", supported)
    assert resolve_precision("auto") == "float32"
    in_hardware = True
    assert resolve_precision("auto") == "bfloat16"


@pytest.mark.parametrize(("older", "expected"), [(True, "bfloat16"), (False, "float32"), (None, "float32")])
def test_auto_on_a_torch_that_names_no_capabilities(
    monkeypatch: pytest.MonkeyPatch, older: bool | None, expected: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.delattr("torch.cpu.get_capabilities")
    monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported", raising=False)
    if older is not None:
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: older, raising=False)
    assert resolve_precision("auto") == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_and_labels_may_lie_elsewhere_than_the_network() -> None:
    model = reference("cnn8")
    surrogate = Surrogate(model.module, model.spec.normalization)
    assert surrogate.gradient(images_for(model), LABELS).device.type == "cuda"
    on_gpu = TorchModel(copy.deepcopy(model.module).cuda(), model.spec)
    logits = on_gpu.predict(images_for(model))
    assert logits.device.type == "cpu"
    assert torch.allclose(logits, model.predict(images_for(model)), rtol=1e-2, atol=1e-3)


def test_the_exact_form_computes_in_float32_with_the_weights_of_the_moment() -> None:
    model = wrap(small_network(), classes=2, shape=(1, 8, 8))
    fast = Surrogate(model.module, GREY, "bfloat16", input_shape=(1, 8, 8))
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.mul_(0.5)
    exact = fast.exact()
    assert exact.precision == "float32" and exact.exact() is exact
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(exact.predict(images), model.predict(images), atol=1e-6)
