"""Fast gradient sign method (Goodfellow et al. 2015): one step of the whole radius; its counterparts in l2 and l1."""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.attacks.pgd import constrain, steepest
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.survivors import Settle, Survivors
from toolkit.attacks.threat import ThreatModel


def fgsm(
    surrogate: Surrogate, images: Tensor, labels: Tensor, threat: ThreatModel, *, settle: Settle | None = None
) -> Tensor:
    """The images, one step along the gradient of the cross-entropy away, float32 [n, C, H, W].

    Args:
        surrogate: whose loss is raised.
        images: float32 [n, C, H, W] in [0, 1].
        labels: int64 [n], the true classes.
        threat: the ball, whose radius is the step.
        settle: told of the result; one step leaves nothing to end.
    """
    images, labels = images.to(surrogate.device), labels.to(surrogate.device)
    scale = threat.pixel_scale(surrogate.normalization).to(images.device)
    direction = steepest(surrogate.gradient(images, labels), images, threat, scale)
    attacked = constrain(images + threat.eps * scale * direction, images, threat, scale)
    Survivors(images, settle).submit(attacked, torch.ones_like(labels, dtype=torch.bool))
    return attacked
