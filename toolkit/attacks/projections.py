"""Projections onto the ball, steepest-ascent steps and random starts, per norm; all on batches [n, C, H, W]."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

TINY = 1e-12
SPARSITY = 0.01
"""Share of the pixels that a step in l1 moves (Tramèr & Boneh 2019)."""

Radius = float | Tensor
"""Of one ball for all images, or of one each, [n, 1, 1, 1]."""


def batch_norm_l2(delta: Tensor) -> Tensor:
    """The l2 norm of each image, [n, 1, 1, 1]."""
    norm: Tensor = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
    return norm


def project_linf(delta: Tensor, eps: Radius) -> Tensor:
    """The nearest point of the l-inf ball; points inside are unchanged."""
    if isinstance(eps, Tensor):
        return delta.clamp(min=-eps, max=eps)
    return delta.clamp(-eps, eps)


def project_l2(delta: Tensor, eps: Radius) -> Tensor:
    """The nearest point of the l2 ball; points inside are unchanged."""
    norm = batch_norm_l2(delta)
    return torch.where(norm > eps, delta * (eps / norm.clamp_min(TINY)), delta)


def project_l1(delta: Tensor, eps: Radius) -> Tensor:
    """The nearest point of the l1 ball (Duchi et al. 2008); points inside are unchanged."""
    return _shrink(delta, eps, delta.abs())


def project_l1_box(delta: Tensor, eps: Radius, low: Tensor, high: Tensor) -> Tensor:
    """The nearest point within the l1 ball and the box `low` <= delta <= `high` (Croce & Hein 2021).

    Projecting onto the one and then the other loses much of the radius where many pixels are at their bounds.

    Args:
        delta: [n, C, H, W].
        eps: of the ball.
        low: at most 0, of the shape of `delta`.
        high: at least 0, likewise.
    """
    return _shrink(delta, eps, torch.minimum(delta.abs(), torch.where(delta > 0, high, -low)))


def _shrink(delta: Tensor, eps: Radius, most: Tensor) -> Tensor:
    """The sign of `delta` times clamp(|delta| - shift, 0, `most`), with the least shift of each image that fits."""
    radius = torch.as_tensor(eps, dtype=torch.float64, device=delta.device).expand(len(delta), 1, 1, 1).view(-1, 1)
    sizes, caps = delta.abs().flatten(1), most.flatten(1)
    signs = delta.sign()
    capped = signs * most
    over = caps.sum(dim=1, dtype=torch.float64) > radius[:, 0]
    if not bool(over.any()):
        return capped
    shift = _shift(sizes[over], caps[over], radius[over])
    shrunk = torch.minimum((sizes[over].double() - shift).clamp_min(0).to(delta.dtype), caps[over])
    result = capped.clone()
    result[over] = signs[over] * shrunk.view_as(signs[over])
    return result


def _shift(sizes: Tensor, caps: Tensor, radius: Tensor) -> Tensor:
    """The shift at which clamp(size - shift, 0, cap) over a row sums to the radius, float64 [n, 1].

    The sum falls linearly between breakpoints: an entry starts to shrink where the shift exceeds its surplus over the
    cap, and ends at its own size.
    """
    starts = sizes - caps
    points, order = torch.cat((starts, sizes), dim=1).sort(dim=1)
    points = points.double()
    shrinking = torch.where(order < sizes.shape[1], 1.0, -1.0).double().cumsum(dim=1)
    fallen = (shrinking[:, :-1] * points.diff(dim=1)).cumsum(dim=1)
    total = caps.sum(dim=1, keepdim=True, dtype=torch.float64)
    reached = ((total - fallen) > radius).sum(dim=1, keepdim=True).clamp_max(points.shape[1] - 2)
    # which entries shrink in the segment of the root; then the root from their own sums, free of cumulated rounding
    middle = 0.5 * (points.gather(1, reached) + points.gather(1, reached + 1))
    moving = ((starts < middle) & (sizes > middle)).double()
    fixed = (starts >= middle).double()
    count = moving.sum(dim=1, keepdim=True).clamp_min(1)
    return ((moving * sizes).sum(dim=1, keepdim=True) + (fixed * caps).sum(dim=1, keepdim=True) - radius) / count


def ascend_linf(gradient: Tensor) -> Tensor:
    """The direction of steepest ascent in l-inf: the sign."""
    return gradient.sign()


def ascend_l2(gradient: Tensor) -> Tensor:
    """The direction of steepest ascent in l2: the gradient over its norm (0 where the gradient is 0)."""
    # divided by the largest entry first: squares of tiny gradients would underflow
    largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
    scaled = gradient / torch.where(largest > 0, largest, torch.ones_like(largest))
    return scaled / batch_norm_l2(scaled).clamp_min(TINY)


def ascend_l1(gradient: Tensor, share: float | Tensor = SPARSITY) -> Tensor:
    """The signs of the largest entries of the gradient, over their number (Tramèr & Boneh 2019).

    The steepest direction would move one pixel alone, which takes as many steps as pixels must change; for a share so
    small that one pixel is left it is that direction.

    Args:
        gradient: [n, C, H, W]; its zeros stay.
        share: of the entries that move, at least one; one value or one per image, [n].
    """
    sizes = gradient.abs().flatten(1)
    entries = sizes.shape[1]
    if isinstance(share, Tensor):
        count = (share * entries).long().clamp(1, entries)
        smallest = sizes.sort(dim=1, descending=True).values.gather(1, count[:, None] - 1)
    else:
        smallest = sizes.topk(min(entries, max(1, int(share * entries))), dim=1).values[:, -1:]
    signs = torch.where(sizes >= smallest, gradient.flatten(1).sign(), 0.0)
    return (signs / signs.abs().sum(dim=1, keepdim=True).clamp_min(1)).view_as(gradient)


def start_linf(shape: torch.Size, eps: float, generator: torch.Generator) -> Tensor:
    """Uniform in the l-inf ball."""
    return torch.empty(shape).uniform_(-eps, eps, generator=generator)


def start_l2(shape: torch.Size, eps: float, generator: torch.Generator) -> Tensor:
    """Uniform in the l2 ball: a uniform direction, and a radius whose d-th power is uniform."""
    direction = torch.empty(shape).normal_(generator=generator)
    dimensions = math.prod(shape[1:])
    radius = torch.rand((shape[0], 1, 1, 1), generator=generator) ** (1 / dimensions)
    return eps * radius * direction / batch_norm_l2(direction)


def start_l1(shape: torch.Size, eps: float, generator: torch.Generator) -> Tensor:
    """Uniform in the l1 ball: spacings of uniform points, all but the last, with random signs."""
    dimensions = math.prod(shape[1:])
    spacings = torch.empty((shape[0], dimensions + 1)).exponential_(generator=generator)
    sizes = spacings[:, :-1] / spacings.sum(dim=1, keepdim=True)
    signs = torch.randint(0, 2, sizes.shape, generator=generator).float().mul_(2).sub_(1)
    return (eps * signs * sizes).view(shape)


NORM: Mapping[str, Callable[[Tensor], Tensor]] = {
    "linf": lambda delta: delta.abs().amax(dim=(1, 2, 3)),
    "l2": lambda delta: torch.linalg.vector_norm(delta, dim=(1, 2, 3)),
    "l1": lambda delta: delta.abs().sum(dim=(1, 2, 3)),
}
"""The size of each perturbation, [n]."""
DUAL: Mapping[str, str] = {"linf": "l1", "l2": "l2", "l1": "linf"}
"""The norm of a gradient that says how fast a unit step can raise the loss (Hölder)."""
PROJECT: Mapping[str, Callable[[Tensor, Radius], Tensor]] = {
    "linf": project_linf,
    "l2": project_l2,
    "l1": project_l1,
}
ASCEND: Mapping[str, Callable[[Tensor], Tensor]] = {"linf": ascend_linf, "l2": ascend_l2, "l1": ascend_l1}
START: Mapping[str, Callable[[torch.Size, float, torch.Generator], Tensor]] = {
    "linf": start_linf,
    "l2": start_l2,
    "l1": start_l1,
}
