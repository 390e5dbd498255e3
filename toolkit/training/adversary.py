"""The attacks of adversarial training, on a network whose weights change from call to call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from toolkit.artifacts import ModelSpec, Normalized
from toolkit.attacks.forms import Precision
from toolkit.attacks.pgd import constrain, steepest
from toolkit.attacks.projections import START
from toolkit.attacks.surrogate import Loss, Surrogate
from toolkit.attacks.threat import RELATIVE_STEP, PgdPlan, ThreatModel

NEAR = 0.03
"""Standard deviation of the start that TRADES needs, in units of eps (the paper's 0.001 at eps 8/255): at the image
itself the divergence from the clean output has no gradient."""
FAST_STEP = 1.25
"""Step of FGSM with random start, in units of eps (Wong et al. 2020)."""


@dataclass(frozen=True, slots=True)
class TrainingAttack:
    """Gradient ascent within a threat model."""

    threat: ThreatModel
    steps: int
    step_size: float
    """In the units of the threat model's ball."""
    start: Literal["uniform", "normal", "zero"] = "uniform"
    """Uniform in the ball, normal with the standard deviation `NEAR` times eps, or the image itself."""

    def record(self) -> dict[str, object]:
        """How it ascends, as plain data; the threat model aside."""
        return {"steps": self.steps, "step_size": self.step_size, "start": self.start}

    @classmethod
    def multi_step(
        cls, threat: ThreatModel, steps: int, start: Literal["uniform", "normal"] = "uniform"
    ) -> TrainingAttack:
        """PGD whose steps together can cross the ball 2.5 times its radius (Madry et al. 2018)."""
        return cls(threat, steps, RELATIVE_STEP * threat.eps / steps, start)

    @classmethod
    def as_measured(cls, plan: PgdPlan, steps: int | None) -> TrainingAttack:
        """The attack by which the plan measures; with `steps`, so many of its steps."""
        return cls(plan.threat, steps or plan.steps, plan.step_size, "uniform" if plan.random_start else "zero")

    @classmethod
    def fast(cls, threat: ThreatModel) -> TrainingAttack:
        """One step from a random start (Wong et al. 2020)."""
        return cls(threat, 1, FAST_STEP * threat.eps)


def training_attack(objective: str, threat: ThreatModel, steps: int) -> TrainingAttack:
    """The attack of an objective; single steps need none."""
    if objective == "fgsm":
        return TrainingAttack.fast(threat)
    return TrainingAttack.multi_step(threat, steps, "normal" if objective == "trades" else "uniform")


class Adversary:
    """Attacks networks of one architecture, with their weights as they are at every call.

    Args:
        module: a network of that architecture.
        spec: of it.
        precision: in which the attacked copy of the network is to run.

    Raises:
        ToolkitError: the network gives no gradient.
    """

    def __init__(self, module: Normalized, spec: ModelSpec, precision: Precision) -> None:
        self._surrogate = Surrogate(module, spec.normalization, precision, input_shape=spec.input_shape)

    def attack(
        self,
        module: Normalized,
        images: Tensor,
        loss: Loss,
        attack: TrainingAttack,
        generator: torch.Generator,
        *,
        rows: slice | None = None,
        of: int = 0,
    ) -> Tensor:
        """Images float32 [n, C, H, W] within the threat model around `images`, on which `loss` is high.

        Args:
            module: the network, in any mode; it is attacked in evaluation mode.
            images: float32 [n, C, H, W] in [0, 1].
            loss: of the network's logits.
            attack: how.
            generator: of the random start.
            rows: where `images` stand in a batch of `of` images, whose random starts are drawn together; None: they
                are the whole batch.
        """
        self._surrogate.refresh(module)
        images = images.to(self._surrogate.device)
        threat = attack.threat
        scale = threat.pixel_scale(self._surrogate.normalization).to(images.device)
        shape = images.shape if rows is None else torch.Size((of, *images.shape[1:]))
        start = _start(shape, attack, generator)
        start = (start if rows is None else start[rows]).to(images.device)
        attacked = constrain(images + scale * start, images, threat, scale)
        for _ in range(attack.steps):
            gradient = self._surrogate.differentiate(attacked, loss).gradient
            direction = steepest(gradient, attacked, threat, scale)
            attacked = constrain(attacked + (attack.step_size * scale) * direction, images, threat, scale)
        return attacked

    def logits(self, module: Normalized, images: Tensor) -> Tensor:
        """Logits float32 [n, classes] of `module` in evaluation mode, in the precision of the attack."""
        self._surrogate.refresh(module)
        return self._surrogate.logits(images)


def _start(shape: torch.Size, attack: TrainingAttack, generator: torch.Generator) -> Tensor:
    """In the units of the ball, on the CPU."""
    if attack.start == "zero":
        return torch.zeros(shape)
    if attack.start == "normal":
        return torch.empty(shape).normal_(0.0, NEAR * attack.threat.eps, generator=generator)
    return START[attack.threat.norm](shape, attack.threat.eps, generator)
