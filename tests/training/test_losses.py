from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from toolkit.attacks.surrogate import Loss
from toolkit.config import TrainConfig
from toolkit.training.losses import (
    ATTACKED,
    OBJECTIVES,
    clean_share,
    cost_per_image,
    cross_entropy_of,
    divergence,
    unused,
)

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


@dataclass
class LinearStep:
    """A batch for the network `images @ weight`; the attack adds `shift` and keeps the loss that it was to raise."""

    weight: Tensor
    shift: Tensor
    target: Tensor = field(default_factory=lambda: LOGITS)
    images: Tensor = field(default_factory=lambda: torch.randn(6, 5, generator=torch.Generator().manual_seed(1)))
    labels: Tensor = field(default_factory=lambda: LABELS)
    raised: list[Loss] = field(default_factory=list)

    def forward(self, images: Tensor) -> Tensor:
        return images @ self.weight

    def attack(self, loss: Loss) -> Tensor:
        self.raised.append(loss)
        return self.images + self.shift

    def frozen_logits(self) -> Tensor:
        return self.forward(self.images).detach()

    def teacher_logits(self) -> Tensor:
        return self.target


def step(shift: float = 0.3) -> LinearStep:
    generator = torch.Generator().manual_seed(2)
    return LinearStep(
        torch.randn(5, 4, generator=generator, requires_grad=True), shift * torch.randn(6, 5, generator=generator)
    )


def config(objective: str, **settings: float) -> TrainConfig:
    return TrainConfig.model_validate({"objective": objective, **settings})


def loss_of(batch: LinearStep, settings: TrainConfig) -> Tensor:
    return OBJECTIVES[settings.objective](batch, settings)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_is_torchs(temperature: float) -> None:
    target = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    expected = functional.kl_div(
        (LOGITS / temperature).log_softmax(1), (target / temperature).log_softmax(1), log_target=True, reduction="none"
    )
    assert torch.allclose(divergence(LOGITS, target, temperature), temperature**2 * expected.sum(1), atol=1e-6)


def test_the_divergence_of_two_coins_by_hand() -> None:
    three_to_one, fair = torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1, 2)
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    assert float(divergence(fair, three_to_one)) == pytest.approx(float(expected), abs=1e-6)


@given(st.lists(st.floats(-30, 30), min_size=6, max_size=6), st.floats(0.5, 10))
def test_the_divergence_is_not_negative_and_does_not_see_a_shift(values: list[float], temperature: float) -> None:
    given_, target = torch.tensor(values).view(2, 1, 3)
    found = divergence(given_, target, temperature)
    assert float(found) > -1e-4
    assert torch.allclose(found, divergence(given_ + 5, target - 7, temperature), atol=1e-2, rtol=1e-3)


def test_standard_and_adversarial_losses_are_cross_entropies() -> None:
    batch = step()
    clean = functional.cross_entropy(batch.images @ batch.weight, LABELS)
    attacked = functional.cross_entropy((batch.images + batch.shift) @ batch.weight, LABELS)
    assert torch.equal(loss_of(batch, config("standard")), clean) and not batch.raised
    for objective in ("adversarial", "fgsm"):
        assert torch.equal(loss_of(batch, config(objective)), attacked)
        mixed = loss_of(batch, config(objective, clean_share=0.25))
        assert torch.allclose(mixed, 0.75 * attacked + 0.25 * clean)
        assert torch.allclose(loss_of(batch, config(objective, clean_share=1.0)), clean)
    raised = batch.raised[0](LOGITS)
    assert torch.equal(raised, functional.cross_entropy(LOGITS, LABELS, reduction="none"))
    assert torch.equal(raised, cross_entropy_of(LABELS)(LOGITS))


def test_trades_without_its_divergence_is_standard_training() -> None:
    batch = step()
    assert torch.allclose(loss_of(batch, config("trades", beta=0)), loss_of(batch, config("standard")))


def test_trades_is_clean_cross_entropy_and_beta_divergences_with_gradients_through_both() -> None:
    batch = step()
    clean, attacked = batch.images @ batch.weight, (batch.images + batch.shift) @ batch.weight
    both = (clean.softmax(1) * (clean.log_softmax(1) - attacked.log_softmax(1))).sum(1).mean()
    expected = functional.cross_entropy(clean, LABELS) + 2.5 * both
    found = loss_of(batch, config("trades", beta=2.5))
    assert torch.allclose(found, expected)
    one, two = (torch.autograd.grad(loss, batch.weight)[0] for loss in (found, expected))
    assert torch.allclose(one, two, atol=1e-6)


def test_the_attack_of_trades_raises_the_divergence_from_the_frozen_clean_output() -> None:
    batch = step()
    loss_of(batch, config("trades"))
    (raised,) = batch.raised
    assert torch.allclose(raised(LOGITS), divergence(LOGITS, batch.frozen_logits()))
    assert float(raised(batch.frozen_logits()).abs().max()) < 1e-6


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["beta", "clean_share", "temperature"])
def test_what_changes_no_loss_is_named(objective: str, name: str) -> None:
    plain, changed = config(objective), config(objective, **{name: 0.7})
    same = torch.equal(loss_of(step(), plain), loss_of(step(), changed))
    assert unused(changed) == ((name,) if same else ())
    assert unused(plain) == ()


def test_a_student_that_equals_its_teacher_has_nothing_to_learn() -> None:
    batch = step(shift=0.0)
    batch.target = batch.frozen_logits()
    loss = loss_of(batch, config("distill"))
    (gradient,) = torch.autograd.grad(loss, batch.weight)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6) and float(gradient.abs().max()) < 1e-6


@pytest.mark.parametrize("share", [None, 0.0, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_a_mean_of_divergences_from_the_teachers_clean_labels(
    share: float | None, temperature: float
) -> None:
    batch = step()
    clean, attacked = batch.images @ batch.weight, (batch.images + batch.shift) @ batch.weight
    settings = TrainConfig(objective="distill", clean_share=share, temperature=temperature)
    part = 1 / 6 if share is None else share
    expected = (1 - part) * divergence(attacked, LOGITS, temperature).mean()
    expected = expected + part * divergence(clean, LOGITS, temperature).mean()
    assert torch.allclose(loss_of(batch, settings), expected)
    assert torch.allclose(batch.raised[0](clean), divergence(clean, LOGITS, temperature))


def test_the_share_of_clean_images_is_the_users_or_the_objectives() -> None:
    assert clean_share(config("distill")) == 1 / 6 and clean_share(config("adversarial")) == 0
    assert clean_share(config("distill", clean_share=0)) == 0 and clean_share(config("fgsm", clean_share=0.3)) == 0.3


def test_costs_count_attack_steps_and_passes() -> None:
    costs = {name: cost_per_image(config(name, attack_steps=5)) for name in (*OBJECTIVES, "none")}
    once = costs["standard"]
    assert costs["none"] == 0 < once
    assert costs["adversarial"] == 5 + once and costs["fgsm"] == 1 + once
    assert costs["trades"] == costs["distill"] == 5 + 2 * once
    assert cost_per_image(config("distill", attack_steps=5, clean_share=0)) == costs["adversarial"]
    assert cost_per_image(config("adversarial", attack_steps=5, clean_share=0.5)) == costs["trades"]


def test_all_objectives_but_the_standard_one_attack() -> None:
    for name in OBJECTIVES:
        batch = step()
        loss_of(batch, config(name))
        assert bool(batch.raised) == (name in ATTACKED) == (name != "standard")
