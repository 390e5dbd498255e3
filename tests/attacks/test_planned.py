from __future__ import annotations

import numpy as np
import torch

from tests.toys import halves, linear_model
from toolkit.artifacts import Batch
from toolkit.attacks.planned import PlannedAttack
from toolkit.attacks.threat import PgdPlan, ThreatModel

PLAN = PgdPlan("pixel", ThreatModel("linf", 0.1, "pixels", clip=True), 3, 0.1, random_start=True)


def test_a_linear_network_moves_to_the_corner_and_equal_positions_get_equal_images() -> None:
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    model, split = linear_model(weight, (1, 8, 8)), halves(12)
    batch = split.take(np.arange(12, dtype=np.int64))
    attack = PlannedAttack(model, PLAN, seed=3, precision="float32")
    first = attack.attack(batch, 0)
    attack.attack(Batch(batch.images[:5], batch.labels[:5]), 1, 2)
    assert torch.equal(attack.attack(batch, 0), first), "whatever ran before"
    again = PlannedAttack(model, PLAN, seed=3, precision="float32")
    assert torch.equal(again.attack(batch, 0), first)
    direction = (weight[1] - weight[0]).sign().view(1, 1, 8, 8) * (1 - 2 * batch.labels).view(-1, 1, 1, 1)
    assert torch.allclose(first, (batch.images + 0.1 * direction).clamp(0, 1), atol=1e-6)
    few = PlannedAttack(model, PgdPlan("pixel", PLAN.threat, 1, 0.01, random_start=True), seed=3, precision="float32")
    assert not torch.equal(few.attack(batch, 0), few.attack(batch, 1)), "another start elsewhere"
