from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.toys import RGB, small_network, wrap
from toolkit.artifacts import TorchModel
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
    gradient = Surrogate(model.module, model.spec.normalization).gradient(images, LABELS)
    expected = plain_gradient(model, images)
    assert gradient.dtype == torch.float32 and gradient.shape == images.shape
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


# rounding turns some ReLUs of a deep network with random weights, so its bound is lower
@pytest.mark.parametrize(("architecture", "cosine_bound"), [("cnn8", 0.99), ("resnet18", 0.95)])
def test_the_gradient_in_bfloat16_points_the_same_way(architecture: str, cosine_bound: float) -> None:
    model = reference(architecture)
    images = images_for(model)
    gradient = Surrogate(model.module, model.spec.normalization, "bfloat16").gradient(images, LABELS)
    cosine = functional.cosine_similarity(gradient.flatten(1), plain_gradient(model, images).flatten(1))
    assert gradient.dtype == torch.float32 and float(cosine.min()) > cosine_bound


def test_the_gradient_matches_finite_differences() -> None:
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 10)), shape=(3, 2, 2))
    model = wrap(model.network, shape=(3, 2, 2), normalization=RGB)
    images = images_for(model)
    gradient = Surrogate(model.module, RGB).gradient(images, LABELS)
    exact = copy.deepcopy(model.module).double()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)).double()

    def loss(step: float) -> float:
        logits = exact(images.double() + step * direction)
        return functional.cross_entropy(logits, LABELS, reduction="sum").item()

    assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_callers_module_is_never_changed(precision: str) -> None:
    model = wrap(small_network(batch_norm=True), classes=2, shape=(1, 8, 8))
    model.module.train()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    surrogate = Surrogate(model.module, model.spec.normalization, resolve_precision("float32"))
    surrogate = Surrogate(model.module, model.spec.normalization, "bfloat16") if precision != "float32" else surrogate
    surrogate.gradient(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0]))
    after = model.module.state_dict()
    assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items())
    assert model.module.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.module.parameters())
    assert not any(value.requires_grad for _, value in surrogate._pairs), "the surrogate's own weights are frozen"


def test_batch_norm_runs_in_evaluation_mode() -> None:
    model = wrap(small_network(batch_norm=True), classes=2, shape=(1, 8, 8))
    model.module.train()
    surrogate = Surrogate(model.module, model.spec.normalization)
    images, labels = torch.rand(4, 1, 8, 8, generator=GENERATOR), torch.tensor([0, 1, 1, 0])
    whole = surrogate.gradient(images, labels)
    assert torch.allclose(whole[:1], surrogate.gradient(images[:1], labels[:1]), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_refresh_follows_a_network_in_training(precision: str) -> None:
    model = wrap(small_network(batch_norm=True), classes=2, shape=(1, 8, 8))
    kind = "bfloat16" if precision == "bfloat16" else "float32"
    surrogate = Surrogate(model.module, model.spec.normalization, "bfloat16" if kind == "bfloat16" else "float32")
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0])
    before = surrogate.gradient(images, labels)
    model.module.train()(images)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(0.1)
    assert torch.equal(surrogate.gradient(images, labels), before)
    surrogate.refresh(model.module)
    after = surrogate.gradient(images, labels)
    fresh = Surrogate(model.module, model.spec.normalization, "bfloat16" if kind == "bfloat16" else "float32")
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
def test_a_precision_that_is_asked_for_is_taken(precision: str) -> None:
    asked = "bfloat16" if precision == "bfloat16" else "float32"
    assert resolve_precision("bfloat16" if asked == "bfloat16" else "float32") == asked


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
