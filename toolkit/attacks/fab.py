"""FAB, the fast adaptive boundary attack, targeted (Croce & Hein 2020): the closest point across a boundary.

Every step linearises one boundary, projects onto it within the pixel range, both the current point and the image
itself, and mixes the two; a point that fools the surrogate is drawn back towards the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.attacks.boundary import Box, displacement
from toolkit.attacks.losses import target_of
from toolkit.attacks.minimum_norm import SUBMIT_EVERY, MinimumNorm, Search
from toolkit.attacks.projections import DUAL, NORM, START
from toolkit.attacks.surrogate import Slope, Surrogate
from toolkit.attacks.survivors import Settle, narrowed
from toolkit.attacks.threat import ThreatModel

OVERSHOOT = 1.05
"""By how much a projection is prolonged beyond the boundary (eta in the paper)."""
BACKWARD = 0.9
"""Share of its perturbation that a point keeps when it is drawn back (beta)."""
MOST_OF_IMAGE = 0.1
"""The largest weight of the image's own projection (alpha_max)."""
TIED, LEAST_STEP = 0.02, 1e-4
"""Where both classes tie, the boundary is taken to lie as far away as this share of the perturbation, or this."""
NEAREST = 1e-8
"""Norms of projections below which they do not weigh."""
CONVERGING = (0.05, 0.15, 0.3)
"""Shares of all steps: from each to the next a perturbation shrinks more than from there to the end."""
SLACK = 1.1
"""By how much the expected end must lie beyond the radius for an image to be given up."""


@dataclass
class _State:
    """One row per image still attacked."""

    images: Tensor
    labels: Tensor
    targets: Tensor
    current: Tensor
    early: Tensor
    """Norms of the smallest perturbations when they were last looked at, [n]."""


def fab_targeted(
    surrogate: Surrogate,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    rank: int | Tensor,
    generator: torch.Generator,
    restarts: int = 1,
    reachable_only: bool = False,
    settle: Settle | None = None,
) -> MinimumNorm:
    """The smallest perturbations found across the boundary to each image's `rank`-th likeliest other class.

    Args:
        surrogate: that is to be fooled, into whatever class; best in float32, since bfloat16 rounds the differences
            of logits that are projected on.
        images: float32 [n, C, H, W] in [0, 1].
        labels: int64 [n], the true classes.
        threat: norm (l-inf, l2 or l1), space and clipping; its radius bounds the random starts and what is judged.
        steps: gradients per image and restart.
        rank: 1 for the likeliest other class; below the number of classes. One for all images, or int64 [n].
        generator: of the random starts, which all restarts but the first have.
        restarts: searches, each for points closer than those before.
        reachable_only: give up images whose perturbations converge to a size beyond the radius of the threat model.
        settle: ends the attack on images that fool the graph that counts.
    """
    search = Search(surrogate, images, labels, threat, settle)
    targets = target_of(search.logits, search.labels, rank)
    for restart in range(restarts):
        if not len(search):
            break
        rows = search.positions
        current = search.images[rows] if restart == 0 else _random_start(search, generator)
        state = _State(search.images[rows], search.labels[rows], targets[rows], current, search.norms)
        _approach(surrogate, search, state, steps, reachable_only)
    return search.finish()


def _random_start(search: Search, generator: torch.Generator) -> Tensor:
    """Uniform in the ball of half the radius, or of half the smallest perturbation found if that is less."""
    images = search.images[search.positions]
    start = START[search.threat.norm](images.shape, 0.5, generator).to(images.device)
    radius = search.norms.clamp_max(search.threat.eps).view(-1, 1, 1, 1)
    return search.clip(images + search.scale * radius * start)


def _approach(surrogate: Surrogate, search: Search, state: _State, steps: int, reachable_only: bool) -> None:
    looks = [int(share * steps) for share in CONVERGING]
    for step in range(1, steps + 1):
        if not len(search):
            break
        state.current = _cross(search, state, _slope(surrogate, state))
        fooled = surrogate.logits(state.current).argmax(dim=1) != state.labels
        search.record(state.current, fooled)
        drawn_back = state.images + BACKWARD * (state.current - state.images)
        state.current = torch.where(fooled.view(-1, 1, 1, 1), drawn_back, state.current)
        keep = search.settle(everything=step % SUBMIT_EVERY == 0)
        if keep is not None:
            state = narrowed(state, keep)
        if reachable_only and step in looks and len(search):
            if step > looks[0]:
                keep = search.leave(_hopeless(search, state))
                if keep is not None:
                    state = narrowed(state, keep)
            state.early = search.norms


def _hopeless(search: Search, state: _State) -> Tensor:
    """Where even another shrinking like the last one leaves the perturbation beyond the radius, bool [m].

    Of 1,092 pairs of an image and a target on a standard and a robust network, each at five radii of l-inf, none that
    this gives up came within 1.09 radii in 100 steps.
    """
    shrunk = search.norms / state.early
    return search.norms.isfinite() & (search.norms * shrunk > SLACK * search.threat.eps)


def _slope(surrogate: Surrogate, state: _State) -> Slope:
    """The target's logit minus the true class's, which is 0 on the boundary between them."""
    labels, targets = state.labels[:, None], state.targets[:, None]
    return surrogate.differentiate(
        state.current, lambda logits: (logits.gather(1, targets) - logits.gather(1, labels))[:, 0]
    )


def _cross(search: Search, state: _State, slope: Slope) -> Tensor:
    """Just beyond the linearised boundary: from the current point, with a share of the way from the image."""
    scale, norm = search.scale, search.threat.norm
    perturbation = ((state.current - state.images) / scale).flatten(1)
    weight = (slope.gradient * scale).flatten(1)
    box = search.box()
    # what is left to the bounds may be below 0 by rounding
    left = None if box is None else Box((box.low - perturbation).clamp_max(0), (box.high - perturbation).clamp_min(0))
    # on a tie, as rounded logits have, nothing says how far: a little further, towards the target
    size = (TIED * NORM[norm](perturbation.view_as(state.images))).clamp_min(LEAST_STEP)
    dual = NORM[DUAL[norm]](weight.view_as(state.images))
    loss = torch.where(slope.loss == 0, -size * dual, slope.loss)
    from_current = displacement(norm, weight, loss, left)
    from_image = displacement(norm, weight, slope.loss - (weight * perturbation).sum(dim=1), box)
    near, far = (
        NORM[norm](moved.view_as(state.images)).clamp_min(NEAREST)[:, None] for moved in (from_current, from_image)
    )
    share = (near / (near + far)).clamp_max(MOST_OF_IMAGE)
    mixed = (1 - share) * (perturbation + OVERSHOOT * from_current) + share * OVERSHOOT * from_image
    return search.clip(state.images + scale * mixed.view_as(state.images))
