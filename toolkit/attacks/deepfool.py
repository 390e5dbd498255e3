"""DeepFool (Moosavi-Dezfooli et al. 2016): steps onto the nearest linearised boundary, until one is crossed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.attacks.boundary import displacement
from toolkit.attacks.losses import ranked_targets
from toolkit.attacks.minimum_norm import MinimumNorm, Search, require_norm
from toolkit.attacks.projections import DUAL, NORM
from toolkit.attacks.surrogate import Slope, Surrogate
from toolkit.attacks.survivors import Settle, narrowed
from toolkit.attacks.threat import ThreatModel

OVERSHOOT = 0.02
"""Share by which the whole perturbation is prolonged beyond the boundary (eta in the paper)."""
CANDIDATES = 9
"""Other classes whose boundaries are tried: each costs a gradient per step."""
FURTHER = 1e-4
"""Added to each distance, in units of the ball, for steps that are too small to cross anything."""


@dataclass
class _State:
    """One row per image still attacked."""

    images: Tensor
    labels: Tensor
    targets: Tensor
    """int64 [n, candidates]"""
    total: Tensor
    """The perturbation before it is prolonged and clipped, in units of the ball."""
    current: Tensor
    active: Tensor
    """Images that do not fool the surrogate yet, bool [n]."""


def deepfool(
    surrogate: Surrogate,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    steps: int = 50,
    candidates: int = CANDIDATES,
    settle: Settle | None = None,
) -> MinimumNorm:
    """Small perturbations that fool the surrogate: the first that each image comes across.

    Args:
        surrogate: that is to be fooled.
        images: float32 [n, C, H, W] in [0, 1].
        labels: int64 [n], the true classes.
        threat: norm (l-inf or l2), space and clipping; its radius matters only to what is judged.
        steps: at most, of `candidates` gradients each.
        candidates: likeliest other classes of each image whose boundaries are tried.
        settle: ends the attack on images that fool the graph that counts.

    Raises:
        ToolkitError: a threat model in l1.
    """
    require_norm("DeepFool", threat, ("linf", "l2"))
    search = Search(surrogate, images, labels, threat, settle)
    targets = ranked_targets(search.logits, search.labels)[:, :candidates]
    images, labels = search.images, search.labels
    state = _State(images, labels, targets, torch.zeros_like(images), images, search.norms.isinf())
    for _ in range(steps):
        if not bool(state.active.any()):
            break
        rows = state.active.nonzero()[:, 0]
        moving = narrowed(state, rows)
        moving.total = moving.total + _onto_nearest(surrogate, search, moving)
        moving.current = search.clip(moving.images + search.scale * (1 + OVERSHOOT) * moving.total)
        state.total = state.total.index_copy(0, rows, moving.total)
        state.current = state.current.index_copy(0, rows, moving.current)
        fooled = torch.zeros_like(state.active)
        fooled[rows] = surrogate.logits(moving.current).argmax(dim=1) != moving.labels
        search.record(state.current, fooled)
        state.active = state.active & ~fooled
        keep = search.settle(everything=False)
        if keep is not None:
            state = narrowed(state, keep)
    return search.finish()


def _onto_nearest(surrogate: Surrogate, search: Search, state: _State) -> Tensor:
    """The displacement onto the nearest linearised boundary, in units of the ball, [n, C, H, W]."""
    norm = search.threat.norm
    nearest: Tensor | None = None
    weight = value = state.total
    for column in range(state.targets.shape[1]):
        slope = _difference(surrogate, state, state.targets[:, column])
        gradient = slope.gradient * search.scale
        distance = slope.loss.abs() / NORM[DUAL[norm]](gradient).clamp_min(1e-8)
        if nearest is None:
            nearest, weight, value = distance, gradient, slope.loss
            continue
        closer = distance < nearest
        nearest = torch.where(closer, distance, nearest)
        weight = torch.where(closer.view(-1, 1, 1, 1), gradient, weight)
        value = torch.where(closer, slope.loss, value)
    # on a tie, as rounded logits have, nothing says how far: a little further, towards the target
    further = (OVERSHOOT * NORM[norm](state.total)).clamp_min(FURTHER)
    value = torch.where(value == 0, -further * NORM[DUAL[norm]](weight), value)
    step = displacement(norm, weight.flatten(1), value, None).view_as(state.images)
    length = NORM[norm](step).clamp_min(1e-12).view(-1, 1, 1, 1)
    return step * (1 + FURTHER / length)


def _difference(surrogate: Surrogate, state: _State, targets: Tensor) -> Slope:
    """The target's logit minus the true class's."""
    rows, labels = targets[:, None], state.labels[:, None]
    return surrogate.differentiate(
        state.current, lambda logits: (logits.gather(1, rows) - logits.gather(1, labels))[:, 0]
    )
