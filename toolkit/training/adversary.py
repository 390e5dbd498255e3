"""The attack of adversarial training, on a network whose weights change from call to call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from toolkit.artifacts import ModelSpec, Normalized
from toolkit.attacks.forms import Precision
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import RELATIVE_STEP, PgdPlan


def training_plan(plan: PgdPlan, steps: int) -> PgdPlan:
    """The attack of adversarial training: the same threat model, fewer steps, a random start."""
    return replace(plan, steps=steps, step_size=RELATIVE_STEP * plan.threat.eps / steps, random_start=True, restarts=1)


class Adversary:
    """Attacks `module` with its weights as they are at every call.

    Args:
        module: the network in training.
        spec: of it.
        plan: the attack.
        precision: in which the attack's copy of the network is to run.
    """

    def __init__(self, module: Normalized, spec: ModelSpec, plan: PgdPlan, precision: Precision) -> None:
        self._module, self._plan = module, plan
        self._surrogate = Surrogate(module, spec.normalization, precision, input_shape=spec.input_shape)

    def attack(self, images: Tensor, labels: Tensor, generator: torch.Generator, steps: int | None = None) -> Tensor:
        """Attacked images, in `steps` steps if it is given."""
        self._surrogate.refresh(self._module)
        return pgd(self._surrogate, images, labels, replace(self._plan, steps=steps or self._plan.steps), generator)
