"""Projections onto a linearised decision boundary within a box, per norm (Croce & Hein 2020); all on rows [n, d].

Where the box does not reach the boundary, the point of the box that comes nearest to it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FARTHEST = 1e4
"""The largest entry of a displacement without a box, in units of the ball: where the gradient all but vanishes, the
linearised boundary lies beyond what floats hold."""


@dataclass(frozen=True, slots=True)
class Box:
    """How far every entry may move, [n, d] each, `low` <= 0 <= `high`."""

    low: Tensor
    high: Tensor


def displacement(norm: str, weight: Tensor, value: Tensor, box: Box | None) -> Tensor:
    """The smallest displacement d in `norm`, within the box, with weight · d + value = 0; float32 [n, d].

    Args:
        norm: linf, l2 or l1.
        weight: gradients of the linearised function, float32 [n, d]; where all of a row is 0, so is the displacement.
        value: of the function at the points that are to be displaced, float32 [n].
        box: None: no bounds.
    """
    # the problem does not change with the size of the function, but squares of tiny gradients would underflow
    largest = weight.abs().amax(dim=1, keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    toward = -(weight / largest) * value.sign()[:, None]
    room = None if box is None else torch.where(toward > 0, box.high, -box.low)
    lengths = LENGTHS[norm](toward.abs(), value.abs()[:, None] / largest, room)
    moved = torch.where(toward == 0, 0.0, toward.sign() * lengths)
    return moved.clamp(-FARTHEST, FARTHEST) if box is None else moved


def _lengths_linf(gain: Tensor, needed: Tensor, room: Tensor | None) -> Tensor:
    """All entries move alike, as far as each may."""
    if room is None:
        return (needed / gain.sum(dim=1, keepdim=True)).expand_as(gain)
    return torch.minimum(_level(gain, gain * room, needed), room)


def _lengths_l2(gain: Tensor, needed: Tensor, room: Tensor | None) -> Tensor:
    """All entries move in proportion to what they gain, as far as each may."""
    if room is None:
        return needed / gain.square().sum(dim=1, keepdim=True) * gain
    return torch.minimum(_level(gain.square(), gain * room, needed) * gain, room)


def _lengths_l1(gain: Tensor, needed: Tensor, room: Tensor | None) -> Tensor:
    """Entries move one after another, those that gain most first, each as far as it may."""
    if room is None:
        most, where = gain.max(dim=1, keepdim=True)
        return torch.zeros_like(gain).scatter(1, where, needed / most)
    gains, order = gain.sort(dim=1, descending=True)
    rooms = room.gather(1, order)
    gained = gains * rooms
    before = gained.cumsum(dim=1) - gained
    lengths = torch.where(gains > 0, (needed - before) / gains, 0.0).clamp_min(0)
    return torch.zeros_like(gain).scatter(1, order, torch.minimum(lengths, rooms))


def _level(slope: Tensor, cap: Tensor, needed: Tensor) -> Tensor:
    """The level at which the sum of min(level * slope, cap) over a row is `needed`, [n, 1]; inf if the caps are less.

    The sum is concave and piecewise linear in the level, so Newton's method rises to the root and is there as soon as
    no further entry reaches its cap: a handful of passes, where sorting the entries would cost more.
    """
    level = needed / slope.sum(dim=1, keepdim=True)
    capped = -1
    while True:
        # entries without slope count as full at any level, an infinite one included, so that the count only rises
        full = (level * slope >= cap) | (slope == 0)
        count = int(full.sum())
        if count == capped:
            return level
        capped = count
        rest = torch.where(full, 0.0, slope).sum(dim=1, keepdim=True)
        filled = torch.where(full, cap, 0.0).sum(dim=1, keepdim=True)
        # never falls, so that rounding cannot make it turn in circles
        level = torch.maximum(level, torch.where(rest > 0, (needed - filled) / rest, torch.inf))


LENGTHS: Mapping[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "linf": _lengths_linf,
    "l2": _lengths_l2,
    "l1": _lengths_l1,
}
"""Gains [n, d] per unit of length, the gain needed [n, 1] and the room of every entry to lengths [n, d] >= 0."""
