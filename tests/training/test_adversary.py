from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.toys import linear_model, wrap
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.training.adversary import NEAR, Adversary, TrainingAttack, training_attack
from toolkit.training.losses import cross_entropy_of

LINF = ThreatModel("linf", 0.1, "pixels", clip=False)
L2 = ThreatModel("l2", 0.5, "normalised", clip=True)
WEIGHT = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 2


def attacked_by(attack: TrainingAttack, weight: Tensor = WEIGHT) -> Tensor:
    model = linear_model(weight, (1, 4, 4))
    adversary = Adversary(model.module, model.spec, "float32")
    generator = torch.Generator().manual_seed(3)
    return adversary.attack(model.module, IMAGES, cross_entropy_of(LABELS), attack, generator).cpu()


@pytest.mark.parametrize("objective", ["adversarial", "trades", "distill"])
def test_many_steps_reach_the_worst_corner_of_a_linear_network(objective: str) -> None:
    attacked = attacked_by(training_attack(objective, LINF, 20))
    away = torch.where(LABELS.bool()[:, None], WEIGHT[0] - WEIGHT[1], WEIGHT[1] - WEIGHT[0]).sign().view(8, 1, 4, 4)
    assert torch.allclose(attacked, IMAGES + 0.1 * away, atol=1e-6)


def test_a_single_step_goes_from_a_random_start_and_is_projected() -> None:
    attack = training_attack("fgsm", LINF, 7)
    assert attack.steps == 1 and attack.step_size == pytest.approx(0.125)
    delta = attacked_by(attack) - IMAGES
    away = torch.where(LABELS.bool()[:, None], WEIGHT[0] - WEIGHT[1], WEIGHT[1] - WEIGHT[0]).sign().view(8, 1, 4, 4)
    along = delta * away
    # from -eps or more by 1.25 eps, cut at eps
    assert float(along.min()) >= 0.025 - 1e-6 and float(along.max()) == pytest.approx(0.1, abs=1e-6)
    assert len(set(along.flatten().tolist())) > 20, "the start is random"


@pytest.mark.parametrize(
    "threat", [LINF, L2, ThreatModel("l1", 3.0, "pixels", clip=True), ThreatModel("l1", 6.0, "normalised", clip=True)]
)
def test_training_attacks_as_the_evaluation_does_in_every_norm(threat: ThreatModel) -> None:
    """In l1 a step moves the pixels that can still move, not those of the largest gradient alone."""
    torch.manual_seed(5)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    model = wrap(network, classes=2, shape=(1, 8, 8))
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    labels = torch.arange(16) % 2
    plan = PgdPlan("paper", threat, 10, 0.3 * threat.eps, random_start=True)
    how = TrainingAttack.as_measured(plan, None)
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    adversary = Adversary(model.module, model.spec, "float32")
    found = adversary.attack(model.module, images, cross_entropy_of(labels), how, first)
    wanted = pgd(Surrogate(model.module, model.spec.normalization), images, labels, plan, second)
    assert torch.equal(found, wanted) and not torch.equal(found, images)


@pytest.mark.parametrize("threat", [LINF, L2])
@pytest.mark.parametrize("objective", ["fgsm", "adversarial", "trades"])
def test_no_attack_leaves_its_threat_model(threat: ThreatModel, objective: str) -> None:
    attacked = attacked_by(training_attack(objective, threat, 3))
    if threat is LINF:
        assert float((attacked - IMAGES).abs().max()) <= 0.1 + 1e-6
    else:
        normalised = (attacked - IMAGES) / 0.5
        assert float(normalised.flatten(1).norm(dim=1).max()) <= 0.5 + 1e-5
        assert float(attacked.min()) >= 0 and float(attacked.max()) <= 1


def test_where_nothing_can_be_raised_the_start_remains() -> None:
    flat = torch.zeros_like(WEIGHT)
    near = (attacked_by(training_attack("trades", LINF, 3), flat) - IMAGES) / 0.1
    assert float(near.std()) == pytest.approx(NEAR, rel=0.3)
    wide = (attacked_by(training_attack("adversarial", LINF, 3), flat) - IMAGES) / 0.1
    assert float(wide.std()) == pytest.approx(3**-0.5, rel=0.2)


def test_the_weights_are_those_of_the_call() -> None:
    model, other = linear_model(WEIGHT, (1, 4, 4)), linear_model(-WEIGHT, (1, 4, 4))
    adversary = Adversary(model.module, model.spec, "float32")
    attack = TrainingAttack.multi_step(LINF, 20)
    found = [
        adversary.attack(m.module, IMAGES, cross_entropy_of(LABELS), attack, torch.Generator().manual_seed(0)) - IMAGES
        for m in (model, other)
    ]
    assert torch.allclose(found[0], -found[1], atol=1e-6)
    for m in (model, other):
        assert torch.allclose(adversary.logits(m.module, IMAGES).cpu(), m.predict(IMAGES), atol=1e-5)


@pytest.mark.parametrize("random_start", [False, True])
def test_the_attack_as_measured_is_that_of_the_evaluation(random_start: bool) -> None:
    plan = PgdPlan("paper", LINF, 3, 0.02, random_start)
    attack = TrainingAttack.as_measured(plan, None)
    assert (attack.steps, attack.step_size, attack.start) == (3, 0.02, "uniform" if random_start else "zero")
    model = linear_model(WEIGHT, (1, 4, 4))
    generator = torch.Generator().manual_seed(3)
    wanted = pgd(Surrogate(model.module, model.spec.normalization), IMAGES, LABELS, plan, generator)
    assert torch.allclose(attacked_by(attack), wanted, atol=1e-6)
    assert TrainingAttack.as_measured(plan, 7).steps == 7
