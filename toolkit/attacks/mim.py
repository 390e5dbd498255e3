"""Momentum iterative method (Dong et al. 2018): PGD on an average of gradients, which transfers better."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.attacks.losses import cross_entropy
from toolkit.attacks.pgd import constrain, steepest
from toolkit.attacks.surrogate import Slope, Surrogate
from toolkit.attacks.survivors import Settle, Survivors, narrowed
from toolkit.attacks.threat import ThreatModel

DECAY = 1.0
"""Weight of the momentum before, at every step (mu in the paper)."""
SUBMIT_EVERY = 10
"""Steps after which all survivors are judged, whatever the surrogate makes of them."""


@dataclass
class _State:
    """One row per survivor."""

    images: Tensor
    labels: Tensor
    current: Tensor
    momentum: Tensor


def mim(
    surrogate: Surrogate,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float | None = None,
    settle: Settle | None = None,
) -> Tensor:
    """The last attacked images, float32 [n, C, H, W]; settled ones as they were when settled.

    Args:
        surrogate: whose cross-entropy is raised.
        images: float32 [n, C, H, W] in [0, 1]; the attack starts at them.
        labels: int64 [n], the true classes.
        threat: the ball.
        steps: gradients per image.
        step_size: in units of the ball; None: the radius over `steps`, as in the paper.
        settle: ends the attack on images that fool the graph that counts.
    """
    images, labels = images.to(surrogate.device), labels.to(surrogate.device)
    scale = threat.pixel_scale(surrogate.normalization).to(images.device)
    size = threat.eps / steps if step_size is None else step_size
    survivors = Survivors(images, settle)
    state = _State(images, labels, images, torch.zeros_like(images))
    for step in range(steps):
        slope = _slope(surrogate, state)
        if step:
            suspected = slope.logits.argmax(dim=1) != state.labels
            keep = survivors.submit(state.current, suspected | (step % SUBMIT_EVERY == 0))
            if keep is not None:
                state = narrowed(state, keep)
                slope = narrowed(slope, keep)
            if not len(survivors):
                break
        _move(state, slope.gradient, size, threat, scale)
    keep = survivors.submit(state.current, torch.ones_like(state.labels, dtype=torch.bool))
    return survivors.finish(state.current if keep is None else state.current[keep])


def _slope(surrogate: Surrogate, state: _State) -> Slope:
    return surrogate.differentiate(state.current, lambda logits: cross_entropy(logits, state.labels))


def _move(state: _State, gradient: Tensor, size: float, threat: ThreatModel, scale: Tensor) -> None:
    """One step along the momentum."""
    gradient = gradient * scale
    # by the mean of the sizes rather than their sum: a factor that no step depends on, and sums may overflow
    mean = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
    state.momentum = DECAY * state.momentum + gradient / torch.where(mean > 0, mean, 1.0)
    direction = steepest(state.momentum / scale, state.current, threat, scale)
    state.current = constrain(state.current + size * scale * direction, state.images, threat, scale)
