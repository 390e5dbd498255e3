from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toolkit.attacks.projections import ASCEND, PROJECT, START, batch_norm_l2

NORMS = ("linf", "l2")
SIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "linf": lambda delta: delta.abs().amax(dim=(1, 2, 3)),
    "l2": lambda delta: delta.double().pow(2).sum(dim=(1, 2, 3)).sqrt(),
}
seeds = st.integers(0, 2**31)
radii = st.floats(1e-4, 10)
scales = st.floats(1e-4, 100)


def points(seed: int, scale: float, count: int = 5) -> Tensor:
    return torch.randn(count, 2, 3, 4, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("norm", NORMS)
@given(seed=seeds, eps=radii, scale=scales)
def test_projection_is_inside_idempotent_and_leaves_interior_points(
    norm: str, seed: int, eps: float, scale: float
) -> None:
    delta = points(seed, scale)
    projected = PROJECT[norm](delta, eps)
    assert bool((SIZE[norm](projected) <= eps * (1 + 1e-5)).all())
    assert torch.allclose(PROJECT[norm](projected, eps), projected, rtol=1e-6, atol=0)
    inside = SIZE[norm](delta) <= eps * (1 - 1e-6)
    assert torch.equal(projected[inside], delta[inside])


@settings(max_examples=50)
@pytest.mark.parametrize("norm", NORMS)
@given(seed=seeds, eps=radii, scale=scales)
def test_projection_is_the_nearest_point_of_the_ball(norm: str, seed: int, eps: float, scale: float) -> None:
    delta = points(seed, scale).double()
    distance = (PROJECT[norm](delta, eps) - delta).flatten(1).norm(dim=1)
    for other_seed in range(5):
        other = START[norm](delta.shape, eps, torch.Generator().manual_seed(other_seed)).double()
        assert bool(((other - delta).flatten(1).norm(dim=1) >= distance * (1 - 1e-6) - 1e-9).all())


@pytest.mark.parametrize("norm", NORMS)
@given(seed=seeds, scale=st.floats(1e-30, 1e10))
def test_ascent_is_the_steepest_direction_of_unit_size(norm: str, seed: int, scale: float) -> None:
    gradient = points(seed, scale)
    step = ASCEND[norm](gradient)
    assert torch.allclose(SIZE[norm](step).float(), torch.ones(len(gradient)), rtol=1e-4)
    dual = (gradient.double().abs().sum(dim=(1, 2, 3))) if norm == "linf" else SIZE["l2"](gradient)
    gain = (gradient.double() * step.double()).sum(dim=(1, 2, 3))
    assert torch.allclose(gain, dual, rtol=1e-4), "no direction gains more than the dual norm (Hölder)"


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 1e-30, 1.0, 1e30])
def test_tiny_gradients_do_not_vanish_in_l2(scale: float) -> None:
    step = ASCEND["l2"](torch.full((1, 1, 2, 2), scale))
    assert torch.allclose(step, torch.full((1, 1, 2, 2), 0.5))


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_no_step(norm: str) -> None:
    assert torch.equal(ASCEND[norm](torch.zeros(2, 1, 3, 3)), torch.zeros(2, 1, 3, 3))


def test_random_starts_are_uniform_in_the_linf_ball() -> None:
    eps, count = 0.3, 20_000
    start = START["linf"](torch.Size((count, 1, 1, 3)), eps, torch.Generator().manual_seed(0)).flatten(1).double()
    assert float(start.abs().max()) <= eps
    assert torch.allclose(start.mean(dim=0), torch.zeros(3, dtype=torch.double), atol=5 * eps / math.sqrt(3 * count))
    assert torch.allclose(start.var(dim=0), torch.full((3,), eps**2 / 3, dtype=torch.double), rtol=0.03)


def test_random_starts_are_uniform_in_the_l2_ball() -> None:
    eps, count, dimensions = 0.7, 20_000, 3
    start = START["l2"](torch.Size((count, 1, 1, dimensions)), eps, torch.Generator().manual_seed(0))
    radius = batch_norm_l2(start).flatten().double()
    assert float(radius.max()) <= eps * (1 + 1e-6)
    # of a uniform ball: E[r] = d/(d+1), E[r^2] = d/(d+2), and no direction is preferred
    assert float(radius.mean()) == pytest.approx(eps * dimensions / (dimensions + 1), rel=0.01)
    assert float((radius**2).mean()) == pytest.approx(eps**2 * dimensions / (dimensions + 2), rel=0.01)
    covariance = start.flatten(1).double().T.cov()
    assert torch.allclose(covariance, torch.eye(3).double() * eps**2 / (dimensions + 2), atol=0.005)


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_repeat_with_their_seed(norm: str) -> None:
    shape = torch.Size((4, 3, 5, 5))
    first, second, other = (START[norm](shape, 0.1, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
