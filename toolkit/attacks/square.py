"""Square attack (Andriushchenko et al. 2020): random search with squares; it needs logits alone.

It runs on anything that predicts, an integer ONNX Runtime session included, so masked gradients do not hinder it. Begun
at what attacks by gradients came to, it goes on where they are stuck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from toolkit.artifacts import Normalization, Predictor
from toolkit.attacks.losses import margin
from toolkit.attacks.pgd import constrain
from toolkit.attacks.square_moves import MOVES, STARTS, side_near_boundary, side_of_square
from toolkit.attacks.survivors import Settle, Survivors, narrowed
from toolkit.attacks.threat import ThreatModel

PATIENCE = {100: 30, 200: 8, 500: 3, 1000: 1.5}
"""After so many queries a search that goes on from other attacks gives up the images whose margin, rising on as it did,
would not reach the boundary in so many times as many queries more. Of 306 images near the boundary of three networks
the first two gave up 79 %; of the 27 that 3,000 queries fooled, one. Of 62 others that were left after 500 queries the
last two give up 29; of the 13 that 3,000 queries fooled, one."""
LONG = 1000
"""Queries from which on a search from random stripes looks who will not get there."""
LOOKS = {0.2: torch.inf, 0.4: 2.0, 0.6: 1.75, 0.8: 1.25}
"""After these shares of all queries it gives up the images whose margin would not reach the boundary if it rose by so
many times as much as since the last look (the first only looks). Of 263 images near the boundary of three networks,
two seeds each, 5,000 queries fooled 18, none of which this gives up; it saves 41 % to 56 % of the queries."""


@dataclass
class _State:
    """One row per survivor."""

    images: Tensor
    labels: Tensor
    best: Tensor
    margin: Tensor
    """Of `best`; positive where the target is fooled, 0 where only a judge can tell: integer logits tie."""
    looked: Tensor
    """The margin at the start, or when it was last looked at."""


def square(
    target: Predictor,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    normalization: Normalization,
    *,
    queries: int,
    generator: torch.Generator,
    start: Tensor | None = None,
    reachable_only: bool = False,
    settle: Settle | None = None,
) -> Tensor:
    """Attacked images, float32 [n, C, H, W] on the CPU: those of the largest margin that was found.

    Args:
        target: what is attacked, by its logits.
        images: float32 [n, C, H, W] in [0, 1].
        labels: int64 [n], the true classes.
        threat: the ball.
        normalization: of the network, for a ball that lies behind it.
        queries: calls per image at most, the start included.
        generator: of the search.
        start: float32 [n, C, H, W] within the ball, from which the search goes on with small squares, as other attacks
            left them, and gives up images early (`PATIENCE`); None: stripes (l2, l1: bumps), large squares first.
        reachable_only: without `start`, in long searches, give up images whose margin rises too slowly (`LOOKS`).
        settle: ends the attack on images that are fooled; None: fooling `target` does.
    """
    images, labels = images.cpu(), labels.cpu()
    scale = threat.pixel_scale(normalization)
    survivors = Survivors(images, settle or partial(_fooled, target, labels))
    if start is None:
        best = constrain(images + scale * STARTS[threat.norm](images, threat.eps, generator), images, threat, scale)
        side_at = side_of_square
    else:
        best, side_at = start.cpu().clone(), side_near_boundary
    begun = _height(target.predict(best).cpu(), labels)
    state = _State(images, labels, best, begun, begun)
    patience: Mapping[int, float] = PATIENCE if start is not None else {}
    if start is None and reachable_only and queries >= LONG:
        patience = {int(share * queries): times for share, times in LOOKS.items()}
    judged = state.margin >= 0
    for query in range(1, queries):
        keep = survivors.submit(state.best, judged)
        if keep is not None:
            state = narrowed(state, keep)
        if query in patience:
            keep = survivors.leave(state.best, patience[query] * (state.margin - state.looked) < -state.margin)
            if keep is not None:
                state = narrowed(state, keep)
            if start is None:
                state.looked = state.margin
        if not len(survivors):
            break
        side = side_at(query, queries, images.shape)
        moved = MOVES[threat.norm]((state.best - state.images) / scale, side, threat.eps, generator)
        trial = constrain(state.images + scale * moved, state.images, threat, scale)
        found = _height(target.predict(trial).cpu(), state.labels)
        better = found > state.margin
        judged = better & (found >= 0)
        state.best = torch.where(better.view(-1, 1, 1, 1), trial, state.best)
        state.margin = torch.where(better, found, state.margin)
    else:
        keep = survivors.submit(state.best, judged)
        if keep is not None:
            state = narrowed(state, keep)
    return survivors.finish(state.best)


def _height(logits: Tensor, labels: Tensor) -> Tensor:
    """The margin; logits that are no numbers are no right answer, so that the judge is asked."""
    return margin(logits, labels).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _fooled(target: Predictor, labels: Tensor, attacked: Tensor, positions: Tensor) -> Tensor:
    return target.predict(attacked).cpu().argmax(dim=1) != labels[positions]
