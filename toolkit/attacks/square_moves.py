"""Starts and moves of the Square attack, per norm; perturbations [n, C, H, W] in the units of the ball."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

COVERED = 0.8
"""Share of the image that the first squares cover (p in the paper)."""
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, after which the share that a square covers is halved."""


def side_of_square(query: int, queries: int, shape: torch.Size) -> int:
    """The side of the squares at a query, in pixels, for images [n, C, H, W]."""
    height, width = shape[-2:]
    halvings = sum(10_000 * query / queries > limit for limit in HALVINGS)
    side = round(math.sqrt(COVERED / 2**halvings * height * width))
    return max(1, min(side, height - 1, width - 1))


def signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """-1 or 1, evenly, float32."""
    return torch.randint(0, 2, shape, generator=generator).float().mul_(2).sub_(1)


def windows(shape: torch.Size, side: int, generator: torch.Generator) -> Tensor:
    """One square of `side` pixels per image at a uniform place within it, bool [n, 1, H, W]."""
    count, _, height, width = shape
    top = torch.randint(0, height - side + 1, (count, 1), generator=generator)
    left = torch.randint(0, width - side + 1, (count, 1), generator=generator)
    rows, columns = torch.arange(height), torch.arange(width)
    inside = ((rows >= top) & (rows < top + side))[:, None, :, None]
    return inside & ((columns >= left) & (columns < left + side))[:, None, None, :]


def start_linf(images: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Vertical stripes of one pixel: the sign of every column and channel at random."""
    count, channels, _, width = images.shape
    return (eps * signs((count, channels, 1, width), generator)).expand_as(images)


def move_linf(delta: Tensor, side: int, eps: float, generator: torch.Generator) -> Tensor:
    """A square of every image set to -eps or eps, one sign per channel."""
    colour = eps * signs((*delta.shape[:2], 1, 1), generator)
    return torch.where(windows(delta.shape, side, generator), colour, delta)


STARTS: Mapping[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {"linf": start_linf}
MOVES: Mapping[str, Callable[[Tensor, int, float, torch.Generator], Tensor]] = {"linf": move_linf}
