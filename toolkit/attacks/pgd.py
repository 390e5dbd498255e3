"""Projected gradient descent (Madry et al. 2018): all steps on all images, the last iterate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from toolkit.artifacts import Normalization
from toolkit.attacks.projections import ASCEND, NORM, PROJECT, START, project_l1_box
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import PgdPlan, ThreatModel


def pgd(
    surrogate: Surrogate, images: Tensor, labels: Tensor, plan: PgdPlan, generator: torch.Generator | None = None
) -> Tensor:
    """Attacked images, float32 [n, C, H, W], within the threat model around `images`.

    Args:
        surrogate: whose loss is raised.
        images: float32 [n, C, H, W] in [0, 1].
        labels: int64 [n], the true classes.
        plan: threat model, steps, step size and start; its restarts are the caller's to make.
        generator: of the random start; needed if `plan.random_start`.
    """
    images, labels = images.to(surrogate.device), labels.to(surrogate.device)
    threat = plan.threat
    scale = threat.pixel_scale(surrogate.normalization).to(images.device)
    if plan.random_start:
        if generator is None:
            raise ValueError("a random start needs a generator")
        start = START[threat.norm](images.shape, threat.eps, generator).to(images.device)
        attacked = constrain(images + scale * start, images, threat, scale)
    else:
        attacked = images
    for _ in range(plan.steps):
        direction = steepest(surrogate.gradient(attacked, labels), attacked, threat, scale)
        attacked = constrain(attacked + (plan.step_size * scale) * direction, images, threat, scale)
    return attacked


def steepest(gradient: Tensor, attacked: Tensor, threat: ThreatModel, scale: Tensor) -> Tensor:
    """The direction of a step, of size 1 in units of the ball; in l1 only pixels move that the pixel range lets move.

    Args:
        gradient: with respect to pixels, float32 [n, C, H, W].
        attacked: where the step starts.
        threat: whose norm counts.
        scale: its `pixel_scale`.
    """
    free = movable(gradient, attacked) if threat.norm == "l1" and threat.clip else gradient
    return ASCEND[threat.norm](free * scale)


def movable(gradient: Tensor, attacked: Tensor) -> Tensor:
    """The gradient, 0 where a step along it would leave the pixel range at once.

    The few pixels that a step in l1 moves would else be, after some steps, those that are at their bounds already.
    """
    stuck = ((attacked <= 0.0) & (gradient < 0)) | ((attacked >= 1.0) & (gradient > 0))
    return torch.where(stuck, 0.0, gradient)


def constrain(attacked: Tensor, images: Tensor, threat: ThreatModel, scale: Tensor) -> Tensor:
    """Bring attacked images back into the threat model: the nearest point of ball and pixel range in l-inf and l1.

    In l2 the ball comes first and then the range. Clipping cannot leave the ball again, because the image itself is
    within the pixel range.
    """
    delta = (attacked - images) / scale
    if threat.norm == "l1" and threat.clip:
        low, high = (-images / scale).clamp_max(0), ((1.0 - images) / scale).clamp_min(0)
        delta = project_l1_box(delta, threat.eps, low, high)
    else:
        delta = PROJECT[threat.norm](delta, threat.eps)
    inside = images + scale * delta
    return inside.clamp_(0.0, 1.0) if threat.clip else inside


def largest_violation(attacked: Tensor, images: Tensor, threat: ThreatModel, normalization: Normalization) -> float:
    """By how much attacked images leave the threat model, in units of the ball; at most rounding is right."""
    scale = threat.pixel_scale(normalization).to(images.device)
    over = float((NORM[threat.norm]((attacked - images) / scale) - threat.eps).max())
    if threat.clip:
        over = max(over, float(-attacked.min()), float(attacked.max()) - 1.0)
    return over


def rounding(shape: torch.Size, threat: ThreatModel, normalization: Normalization) -> float:
    """How far rounding in float32 may carry attacked images [n, C, H, W] over the edge, in units of the ball.

    Two parts: the projection's own arithmetic, relative to eps, and that a pixel is only known to the spacing of
    float32 there, which is large in the units of a ball behind a small standard deviation. Over the pixels of an image
    the latter adds up to the root of their number in l2, and to their number in l1.
    """
    finest = float(threat.pixel_scale(normalization).min())
    spacing = torch.finfo(torch.float32).eps * (1 + threat.margin(normalization)) / finest
    pixels = math.prod(shape[1:])
    spacings = {"linf": 4.0, "l2": max(4.0, math.sqrt(pixels)), "l1": float(max(4, pixels))}[threat.norm]
    return 1e-5 * max(1.0, threat.eps) + spacing * spacings
