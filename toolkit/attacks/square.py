"""Square attack (Andriushchenko et al. 2020): random search with squares; it needs logits alone.

It runs on anything that predicts, an integer ONNX Runtime session included, so masked gradients do not hinder it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from toolkit.artifacts import Normalization, Predictor
from toolkit.attacks.losses import margin
from toolkit.attacks.pgd import constrain
from toolkit.attacks.square_moves import MOVES, STARTS, side_of_square
from toolkit.attacks.survivors import Settle, Survivors, narrowed
from toolkit.attacks.threat import ThreatModel


@dataclass
class _State:
    """One row per survivor."""

    images: Tensor
    labels: Tensor
    best: Tensor
    margin: Tensor
    """Of `best`; positive where the target is fooled, 0 where only a judge can tell: integer logits tie."""


def square(
    target: Predictor,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    normalization: Normalization,
    *,
    queries: int,
    generator: torch.Generator,
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
        settle: ends the attack on images that are fooled; None: fooling `target` does.
    """
    images, labels = images.cpu(), labels.cpu()
    scale = threat.pixel_scale(normalization)
    survivors = Survivors(images, settle or partial(_fooled, target, labels))
    best = constrain(images + scale * STARTS[threat.norm](images, threat.eps, generator), images, threat, scale)
    state = _State(images, labels, best, margin(target.predict(best).cpu(), labels))
    judged = state.margin >= 0
    for query in range(1, queries):
        keep = survivors.submit(state.best, judged)
        if keep is not None:
            state = narrowed(state, keep)
        if not len(survivors):
            break
        side = side_of_square(query, queries, images.shape)
        moved = MOVES[threat.norm]((state.best - state.images) / scale, side, threat.eps, generator)
        trial = constrain(state.images + scale * moved, state.images, threat, scale)
        found = margin(target.predict(trial).cpu(), state.labels)
        better = found > state.margin
        judged = better & (found >= 0)
        state.best = torch.where(better.view(-1, 1, 1, 1), trial, state.best)
        state.margin = torch.where(better, found, state.margin)
    else:
        keep = survivors.submit(state.best, judged)
        if keep is not None:
            state = narrowed(state, keep)
    return survivors.finish(state.best)


def _fooled(target: Predictor, labels: Tensor, attacked: Tensor, positions: Tensor) -> Tensor:
    return target.predict(attacked).cpu().argmax(dim=1) != labels[positions]
