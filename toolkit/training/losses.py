"""Training objectives: each turns a batch into the loss to descend."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor
from torch.nn import functional

from toolkit.attacks.surrogate import Loss
from toolkit.config import TrainConfig

CLEAN_SHARE = {"distill": 1 / 6}
"""Share of the loss on clean images where the user sets none, by objective (Zi et al. 2021); of others it is 0."""
ATTACK_STEPS = {"adversarial": 2, "distill": 2, "fgsm": 7, "trades": 7}
"""PGD steps where the user sets none, by objective; of `fgsm` those after a collapse."""
TRAINING_PASS = 1.6
"""Time of a forward and backward pass with the gradients of the weights, in gradients with respect to the image."""
ROUNDED_PASS = 1.4
"""Time of a step on rounded weights and activations, in that of one in float (a training that half rounds took 1.2)."""


class Step(Protocol):
    """One batch in training, and what an objective may ask for; logits are float32 [n, classes]."""

    @property
    def images(self) -> Tensor:
        """float32 [n, C, H, W] in [0, 1]"""
        ...

    @property
    def labels(self) -> Tensor:
        """int64 [n]"""
        ...

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the network in training mode."""
        ...

    def attack(self, loss: Loss) -> Tensor:
        """The batch's images attacked on the current weights so that `loss` rises."""
        ...

    def frozen_logits(self) -> Tensor:
        """Logits of the batch's clean images on the current weights in evaluation mode, without a gradient."""
        ...

    def teacher_logits(self) -> Tensor:
        """Logits that the teacher gives for the batch's clean images."""
        ...


def clean_share(config: TrainConfig) -> float:
    """Share of the loss on clean images, in [0, 1]."""
    return CLEAN_SHARE.get(config.objective, 0.0) if config.clean_share is None else config.clean_share


def attack_steps(config: TrainConfig) -> int:
    """PGD steps of the attack in training; objectives that do not attack have none."""
    return ATTACK_STEPS.get(config.objective, 0) if config.attack_steps is None else config.attack_steps


def cross_entropy_of(labels: Tensor) -> Loss:
    """The cross-entropy per image, for an attack."""
    return lambda logits: functional.cross_entropy(logits, labels, reduction="none")


def divergence(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence KL(softmax(target / T) || softmax(logits / T)) times T squared, float32 [n].

    Args:
        logits: [n, classes].
        target: logits [n, classes] of the distribution that is to be met.
        temperature: T; its square keeps the size of the gradients (Hinton et al. 2015).
    """
    log_target = functional.log_softmax(target / temperature, dim=1)
    log_given = functional.log_softmax(logits / temperature, dim=1)
    return temperature**2 * (log_target.exp() * (log_target - log_given)).sum(dim=1)


def standard_loss(step: Step, _config: TrainConfig) -> Tensor:
    """Mean cross-entropy on clean images."""
    return functional.cross_entropy(step.forward(step.images), step.labels)


def adversarial_loss(step: Step, config: TrainConfig) -> Tensor:
    """Mean cross-entropy on attacked images (Madry et al. 2018), with a share on clean ones if that is set."""
    attacked = step.attack(cross_entropy_of(step.labels))
    loss = functional.cross_entropy(step.forward(attacked), step.labels)
    share = clean_share(config)
    if not share:
        return loss
    return (1 - share) * loss + share * standard_loss(step, config)


def trades_loss(step: Step, config: TrainConfig) -> Tensor:
    """Clean cross-entropy plus beta times KL(clean || attacked), which the attack raises (Zhang et al. 2019)."""
    target = step.frozen_logits()
    attacked = step.attack(lambda logits: divergence(logits, target))
    clean = step.forward(step.images)
    robust = divergence(step.forward(attacked), clean).mean()
    return functional.cross_entropy(clean, step.labels) + config.beta * robust


def distillation_loss(step: Step, config: TrainConfig) -> Tensor:
    """The student's attacked and clean outputs learn the teacher's clean soft labels (RSLAD, Zi et al. 2021)."""
    target, temperature = step.teacher_logits(), config.temperature
    attacked = step.attack(lambda logits: divergence(logits, target, temperature))
    loss = divergence(step.forward(attacked), target, temperature).mean()
    share = clean_share(config)
    if not share:
        return loss
    return (1 - share) * loss + share * divergence(step.forward(step.images), target, temperature).mean()


class Objective(Protocol):
    """A batch in training to its loss."""

    def __call__(self, step: Step, config: TrainConfig, /) -> Tensor: ...


OBJECTIVES: Mapping[str, Objective] = {
    "standard": standard_loss,
    "adversarial": adversarial_loss,
    "fgsm": adversarial_loss,  # with another attack
    "trades": trades_loss,
    "distill": distillation_loss,
}
ATTACKED = ("adversarial", "fgsm", "trades", "distill")
"""Objectives that attack, and so need a threat model."""
USED_BY: Mapping[str, Collection[str]] = {
    "attack_steps": ATTACKED,
    "attack_schedule": ATTACKED,
    "radius": ATTACKED,
    "clean_share": ("adversarial", "fgsm", "distill"),
    "beta": ("trades",),
    "teacher": ("distill",),
    "temperature": ("distill",),
}
"""Settings that some objectives alone use, and which."""


def unused(config: TrainConfig) -> tuple[str, ...]:
    """Settings that are not as by default, and that the objective makes no use of."""
    idle = [name for name, objectives in USED_BY.items() if config.objective not in objectives]
    return tuple(name for name in idle if getattr(config, name) != TrainConfig.model_fields[name].default)


def cost_per_image(config: TrainConfig) -> float:
    """Time of one image in one epoch, in gradients with respect to the image; a teacher's labels not counted."""
    if config.objective == "none":
        return 0.0
    attack = {"standard": 0, "fgsm": 1}.get(config.objective, attack_steps(config))
    passes = 1 + (config.objective == "trades" or (config.objective in ATTACKED and clean_share(config) > 0))
    rounded = 1 - config.qat_from if config.qat else 0.0
    return (attack + TRAINING_PASS * passes) * (1 + (ROUNDED_PASS - 1) * rounded)
