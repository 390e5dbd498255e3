"""Starts and moves of the Square attack, per norm; perturbations [n, C, H, W] in the units of the ball."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

COVERED = 0.8
"""Share of the image that the first squares cover (p in the paper)."""
TINY = 1e-12
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, after which the share that a square covers is halved."""


def side_of_square(query: int, queries: int, shape: torch.Size) -> int:
    """The side of the squares at a query, in pixels, for images [n, C, H, W]."""
    height, width = shape[-2:]
    halvings = sum(10_000 * query / queries > limit for limit in HALVINGS)
    side = round(math.sqrt(COVERED / 2**halvings * height * width))
    return max(1, min(side, height - 1, width - 1))


SMALL = ((0.0, 0.0125), (0.3, 0.00625), (0.6, 0.0015))
"""Shares of all queries, and of the image that a square covers from there on, in a search near the boundary."""


def side_near_boundary(query: int, queries: int, shape: torch.Size) -> int:
    """The same for a search that goes on from images which an attack has brought near the boundary: 3 to 1 of 28."""
    height, width = shape[-2:]
    covered = next(share for begin, share in reversed(SMALL) if query >= begin * queries)
    return max(1, min(round(math.sqrt(covered * height * width)), height - 1, width - 1))


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


def bumps(side: int, power: int) -> Tensor:
    """Two bumps of opposite sign, one above the other, float32 [side, side] of size 1 in the norm (the paper's eta).

    Args:
        side: of the square, in pixels.
        power: 2 for l2, 1 for l1, where the bumps are steeper.
    """
    above, below = _bump(side // 2, side, power), _bump(side - side // 2, side, power)
    pattern = torch.cat((above, -below))
    return pattern / _size(pattern[None, None], power)[0, 0]


def _bump(height: int, width: int, power: int) -> Tensor:
    """A sum of ever larger squares around the middle, cut at the edges, of size 1 in the norm."""
    middle = (height // 2, width // 2)
    across = torch.maximum((torch.arange(height) - middle[0]).abs()[:, None], (torch.arange(width) - middle[1]).abs())
    squares = max(middle) + 1
    heights = 1.0 / torch.arange(1, squares + 1) ** (2 if power == 2 else 4)
    tails = torch.cat((heights.flip(0).cumsum(0).flip(0), torch.zeros(1)))
    bump = tails[across.clamp_max(squares)]
    return bump / _size(bump[None, None], power)[0, 0].clamp_min(TINY)


def _size(delta: Tensor, power: int) -> Tensor:
    """The norm of each channel, [n, C, 1, 1]."""
    return delta.abs().pow(power).sum(dim=(-2, -1), keepdim=True).pow(1 / power)


def _image_size(delta: Tensor, power: int) -> Tensor:
    """The norm of each image, [n, 1, 1, 1]."""
    return delta.abs().pow(power).sum(dim=(1, 2, 3), keepdim=True).pow(1 / power)


def _signed_bumps(shape: tuple[int, int], side: int, power: int, generator: torch.Generator) -> Tensor:
    """Bumps for (n, C) images and channels, [n, C, side, side]: lying or standing per image, signs per channel."""
    pattern = bumps(side, power)
    lying = torch.rand((shape[0], 1, 1, 1), generator=generator) < 0.5
    return torch.where(lying, pattern.T, pattern) * signs((*shape, 1, 1), generator)


def _start_tiled(images: Tensor, size: float, power: int, generator: torch.Generator) -> Tensor:
    """Bumps all over the image, in tiles of a fifth of it, scaled to a norm of `size`."""
    count, channels, height, width = images.shape
    side = max(1, min(height, width) // 5)
    delta = torch.zeros(images.shape)
    for top in range(height % side // 2, height - side + 1, side):
        for left in range(width % side // 2, width - side + 1, side):
            tile = _signed_bumps((count, channels), side, power, generator)
            delta[:, :, top : top + side, left : left + side] = tile
    return delta * (size / _image_size(delta, power))


def _move_mass(delta: Tensor, side: int, eps: float, power: int, generator: torch.Generator) -> Tensor:
    """Empty one window, and put its norm and what is left of the radius into new bumps on another."""
    count, channels, height, width = delta.shape
    # odd, so that both bumps have a middle
    side = min(max(3, side + 1 - side % 2), height, width)
    source, target = (_window(delta.shape, side, generator) for _ in range(2))
    flat = delta.flatten(2)
    both = torch.zeros(count, height * width, dtype=torch.bool).scatter(1, source, True).scatter(1, target, True)
    in_windows = _size(delta * both.view(count, 1, height, width), power)
    left = (eps**power - _image_size(delta, power) ** power).clamp_min(0) / channels
    budget = (left + in_windows**power) ** (1 / power)
    there = target[:, None].expand(-1, channels, -1)
    old = flat.gather(2, there).view(count, channels, side, side)
    new = _signed_bumps((count, channels), side, power, generator) + old / _size(old, power).clamp_min(TINY)
    new = new * (budget / _size(new, power).clamp_min(TINY))
    emptied = flat.scatter(2, source[:, None].expand(-1, channels, -1), 0.0)
    return emptied.scatter(2, there, new.flatten(2)).view(delta.shape)


def _window(shape: torch.Size, side: int, generator: torch.Generator) -> Tensor:
    """A square at a uniform place of each image: the positions of its pixels, int64 [n, side * side]."""
    inside = windows(shape, side, generator).flatten(1)
    return inside.nonzero()[:, 1].view(shape[0], side * side)


def start_l2(images: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Bumps all over the image."""
    return _start_tiled(images, eps, 2, generator)


def move_l2(delta: Tensor, side: int, eps: float, generator: torch.Generator) -> Tensor:
    """Mass moved from one window to another; at the full radius again, whatever clipping took."""
    moved = _move_mass(delta, side, eps, 2, generator)
    return moved * (eps / _image_size(moved, 2).clamp_min(TINY))


def start_l1(images: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Bumps all over the image, beyond the radius: projecting them onto it makes them sparse."""
    return _start_tiled(images, 2 * eps, 1, generator)


def move_l1(delta: Tensor, side: int, eps: float, generator: torch.Generator) -> Tensor:
    """Mass moved from one window to another; to be projected, since it may exceed the radius."""
    return _move_mass(delta, side, eps, 1, generator)


STARTS: Mapping[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "linf": start_linf,
    "l2": start_l2,
    "l1": start_l1,
}
MOVES: Mapping[str, Callable[[Tensor, int, float, torch.Generator], Tensor]] = {
    "linf": move_linf,
    "l2": move_l2,
    "l1": move_l1,
}
