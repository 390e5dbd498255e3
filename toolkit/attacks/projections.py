"""Projections onto the ball, steepest-ascent steps and random starts, per norm; all on batches [n, C, H, W]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

TINY = 1e-12


def batch_norm_l2(delta: Tensor) -> Tensor:
    """The l2 norm of each image, [n, 1, 1, 1]."""
    norm: Tensor = torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)
    return norm


def project_linf(delta: Tensor, eps: float) -> Tensor:
    """The nearest point of the l-inf ball; points inside are unchanged."""
    return delta.clamp(-eps, eps)


def project_l2(delta: Tensor, eps: float) -> Tensor:
    """The nearest point of the l2 ball; points inside are unchanged."""
    norm = batch_norm_l2(delta)
    return torch.where(norm > eps, delta * (eps / norm.clamp_min(TINY)), delta)


def ascend_linf(gradient: Tensor) -> Tensor:
    """The direction of steepest ascent in l-inf: the sign."""
    return gradient.sign()


def ascend_l2(gradient: Tensor) -> Tensor:
    """The direction of steepest ascent in l2: the gradient over its norm (0 where the gradient is 0)."""
    # divided by the largest entry first: squares of tiny gradients would underflow
    largest = gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
    scaled = gradient / torch.where(largest > 0, largest, torch.ones_like(largest))
    return scaled / batch_norm_l2(scaled).clamp_min(TINY)


def start_linf(shape: torch.Size, eps: float, generator: torch.Generator) -> Tensor:
    """Uniform in the l-inf ball."""
    return torch.empty(shape).uniform_(-eps, eps, generator=generator)


def start_l2(shape: torch.Size, eps: float, generator: torch.Generator) -> Tensor:
    """Uniform in the l2 ball: a uniform direction, and a radius whose d-th power is uniform."""
    direction = torch.empty(shape).normal_(generator=generator)
    dimensions = direction[0].numel()
    radius = torch.rand((shape[0], 1, 1, 1), generator=generator) ** (1 / dimensions)
    return eps * radius * direction / batch_norm_l2(direction)


PROJECT: Mapping[str, Callable[[Tensor, float], Tensor]] = {"linf": project_linf, "l2": project_l2}
ASCEND: Mapping[str, Callable[[Tensor], Tensor]] = {"linf": ascend_linf, "l2": ascend_l2}
START: Mapping[str, Callable[[torch.Size, float, torch.Generator], Tensor]] = {"linf": start_linf, "l2": start_l2}
