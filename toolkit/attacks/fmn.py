"""FMN, the fast minimum-norm attack (Pintor et al. 2021): gradient steps within a ball that follows the boundary.

The ball of every image shrinks while its point fools the surrogate and grows while it does not, so that the point
comes to oscillate about the closest part of the boundary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.attacks.losses import margin
from toolkit.attacks.minimum_norm import SUBMIT_EVERY, MinimumNorm, Search
from toolkit.attacks.projections import DUAL, NORM, PROJECT, ascend_l2
from toolkit.attacks.surrogate import Slope, Surrogate
from toolkit.attacks.survivors import Settle, narrowed
from toolkit.attacks.threat import ThreatModel

STEP: Mapping[str, float] = {"linf": 10.0, "l2": 1.0, "l1": 1.0}
"""The l2 length of the first step, in units of the ball."""
LAST_STEP = 0.01
"""Of the last step, relative to the first; in between they follow a cosine."""
CHANGE, LAST_CHANGE = 0.05, 0.001
"""By which share of itself a radius changes in the first and in the last step (gamma)."""
TINY = 1e-12


@dataclass
class _State:
    """One row per image still attacked."""

    images: Tensor
    labels: Tensor
    current: Tensor
    radius: Tensor
    """Of the ball, in its own units, [n]."""


def fmn(
    surrogate: Surrogate,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    settle: Settle | None = None,
) -> MinimumNorm:
    """The smallest perturbations found that fool the surrogate into any class.

    Args:
        surrogate: that is to be fooled.
        images: float32 [n, C, H, W] in [0, 1].
        labels: int64 [n], the true classes.
        threat: norm (l-inf, l2 or l1), space and clipping; its radius matters only to what is judged.
        steps: gradients per image.
        settle: ends the attack on images that fool the graph that counts.
    """
    search = Search(surrogate, images, labels, threat, settle)
    radius = torch.full((len(images),), torch.inf, device=search.images.device)
    state = _State(search.images, search.labels, search.images, radius)
    for step in range(steps):
        if not len(search):
            break
        slope = _slope(surrogate, state)
        fooled = slope.logits.argmax(dim=1) != state.labels
        search.record(state.current, fooled)
        anneal = (1 + math.cos(math.pi * step / steps)) / 2
        state.radius = _radius(search, state, slope, fooled, LAST_CHANGE + (CHANGE - LAST_CHANGE) * anneal)
        state.current = _step(search, state, slope, LAST_STEP + (1 - LAST_STEP) * anneal)
        keep = search.settle(everything=step % SUBMIT_EVERY == SUBMIT_EVERY - 1)
        if keep is not None:
            state = narrowed(state, keep)
    if len(search):
        search.record(state.current, surrogate.logits(state.current).argmax(dim=1) != state.labels)
    return search.finish()


def _slope(surrogate: Surrogate, state: _State) -> Slope:
    """The margin, which is 0 on the boundary."""
    return surrogate.differentiate(state.current, lambda logits: margin(logits, state.labels))


def _radius(search: Search, state: _State, slope: Slope, fooled: Tensor, change: float) -> Tensor:
    """Of the next ball: smaller where the surrogate is fooled; up to the linearised boundary where it never was.

    There it grows at least as fast as later: clipping to the pixel range shortens the perturbation, and a radius that
    starts anew from its length, as published, may stay just short of the boundary for ever.
    """
    steepness = NORM[DUAL[search.threat.norm]](slope.gradient * search.scale)
    boundary = search.size(state.current) + slope.loss.abs() / steepness.clamp_min(TINY)
    grown = state.radius * (1 + change)
    first = torch.where(state.radius.isfinite(), torch.maximum(grown, boundary), boundary)
    outwards = torch.where(search.norms.isfinite(), grown, first)
    radius = torch.where(fooled, torch.minimum(state.radius * (1 - change), search.norms), outwards)
    box = search.box()
    if box is None:
        return radius
    farthest = torch.maximum(-box.low, box.high).view_as(state.images)
    return torch.minimum(radius, NORM[search.threat.norm](farthest))


def _step(search: Search, state: _State, slope: Slope, length: float) -> Tensor:
    """Along the gradient, onto the ball, into the pixel range."""
    scale, norm = search.scale, search.threat.norm
    ahead = (state.current - state.images) / scale + length * STEP[norm] * ascend_l2(slope.gradient * scale)
    inside = PROJECT[norm](ahead, state.radius.view(-1, 1, 1, 1))
    return search.clip(state.images + scale * inside)
