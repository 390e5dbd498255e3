from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toolkit.attacks.projections import (
    ASCEND,
    DUAL,
    NORM,
    PROJECT,
    START,
    ascend_l1,
    batch_norm_l2,
    project_l1_box,
)

NORMS = ("linf", "l2", "l1")
SIZE: dict[str, Callable[[Tensor], Tensor]] = {
    "linf": lambda delta: delta.abs().amax(dim=(1, 2, 3)),
    "l2": lambda delta: delta.double().pow(2).sum(dim=(1, 2, 3)).sqrt(),
    "l1": lambda delta: delta.double().abs().sum(dim=(1, 2, 3)),
}
DUAL_SIZE = {"linf": SIZE["l1"], "l2": SIZE["l2"], "l1": SIZE["linf"]}
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
    assert torch.allclose(PROJECT[norm](projected, eps), projected, rtol=1e-6, atol=1e-6 * eps)
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
    dual = DUAL_SIZE[norm](gradient).double()
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


def test_random_starts_are_uniform_in_the_l1_ball() -> None:
    eps, count, dimensions = 0.7, 20_000, 3
    start = (
        START["l1"](torch.Size((count, 1, 1, dimensions)), eps, torch.Generator().manual_seed(0)).flatten(1).double()
    )
    assert float(start.abs().sum(dim=1).max()) <= eps * (1 + 1e-6)
    # sizes follow a flat Dirichlet distribution of one more entry: E|x| = 1/(d+1), E x^2 = 2/((d+1)(d+2))
    sizes = start.abs().mean(dim=0) / eps
    assert torch.allclose(sizes, torch.full((3,), 1 / (dimensions + 1), dtype=torch.double), rtol=0.02)
    second = 2 * eps**2 / ((dimensions + 1) * (dimensions + 2))
    assert torch.allclose(start.T.cov(), torch.eye(3).double() * second, atol=0.005)
    assert torch.allclose(start.mean(dim=0), torch.zeros(3, dtype=torch.double), atol=0.01)


@pytest.mark.parametrize("norm", NORMS)
@given(seed=seeds, scale=scales)
def test_sizes_are_the_norms_and_bound_the_gain_of_a_step(norm: str, seed: int, scale: float) -> None:
    delta, gradient = points(seed, scale), points(seed + 1, 1.0)
    assert torch.allclose(NORM[norm](delta).double(), SIZE[norm](delta).double(), rtol=1e-5)
    gain = (delta.double() * gradient.double()).sum(dim=(1, 2, 3)).abs()
    assert bool((gain <= NORM[norm](delta).double() * NORM[DUAL[norm]](gradient).double() * (1 + 1e-5)).all())


@pytest.mark.parametrize("norm", NORMS)
@given(seed=seeds, scale=scales)
def test_a_radius_per_image_is_as_good_as_one_for_all(norm: str, seed: int, scale: float) -> None:
    delta = points(seed, scale)
    eps = torch.rand(len(delta), generator=torch.Generator().manual_seed(seed)) * scale + 1e-4
    together = PROJECT[norm](delta, eps.view(-1, 1, 1, 1))
    for row, radius in enumerate(eps.tolist()):
        alone = PROJECT[norm](delta[row : row + 1], radius)
        assert torch.allclose(alone, together[row : row + 1], rtol=1e-5, atol=1e-6 * scale)


@st.composite
def boxed(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    """Points, bounds of which some are 0, and a radius."""
    seed, scale = draw(seeds), draw(st.floats(0.01, 10))
    images = points(seed + 1, 1.0).clamp(0, 1)
    return points(seed, scale), -images, 1 - images, draw(st.floats(1e-3, 20))


@given(boxed())
def test_the_projection_onto_l1_ball_and_box_is_inside_and_leaves_interior_points(
    task: tuple[Tensor, Tensor, Tensor, float],
) -> None:
    delta, low, high, eps = task
    projected = project_l1_box(delta, eps, low, high)
    assert bool((projected >= low).all() and (projected <= high).all())
    assert bool((SIZE["l1"](projected) <= eps * (1 + 1e-6) + 1e-6).all())
    assert torch.allclose(project_l1_box(projected, eps, low, high), projected, atol=1e-6)
    clipped = delta.clamp(low, high)
    fits = SIZE["l1"](clipped) <= eps
    assert torch.equal(projected[fits], clipped[fits]), "where the ball does not bind, it is clipping"


@given(boxed())
def test_the_projection_onto_l1_ball_and_box_is_the_nearest_point(task: tuple[Tensor, Tensor, Tensor, float]) -> None:
    delta, low, high, eps = task
    projected = project_l1_box(delta, eps, low, high).double()
    away = delta.double() - projected
    for seed in range(10):
        other = START["l1"](delta.shape, eps, torch.Generator().manual_seed(seed)).double()
        sparse = torch.zeros_like(other).flatten(1)
        entry = int(other.flatten(1).abs().sum(dim=0).argmax())
        sparse[:, entry] = eps * other.flatten(1)[:, entry].sign()
        for inside in (other.clamp(low, high), sparse.view_as(other).clamp(low, high)):
            # of a convex set: no point of it lies on the far side of the projection
            towards = (away * (inside - projected)).sum(dim=(1, 2, 3))
            assert bool((towards <= 1e-4 * (1 + delta.abs().max())).all())


@given(seed=seeds, eps=st.floats(1e-3, 20))
def test_in_a_box_that_does_not_bind_it_is_the_projection_onto_the_ball(seed: int, eps: float) -> None:
    delta = points(seed, 1.0)
    far = torch.full_like(delta, 1e3)
    assert torch.allclose(project_l1_box(delta, eps, -far, far), PROJECT["l1"](delta, eps), atol=1e-6)


def test_the_projection_onto_the_l1_ball_shrinks_all_entries_alike() -> None:
    delta = torch.tensor([3.0, -2.0, 0.5, 0.0]).view(1, 1, 2, 2)
    expected = torch.tensor([2.0, -1.0, 0.0, 0.0]).view(1, 1, 2, 2)
    assert torch.allclose(PROJECT["l1"](delta, 3.0), expected)
    bounds = torch.tensor([0.5, 9.0, 9.0, 9.0]).view(1, 1, 2, 2)
    capped = torch.tensor([0.5, -2.0, 0.5, 0.0]).view(1, 1, 2, 2)
    assert torch.allclose(project_l1_box(delta, 3.0, -bounds, bounds), capped)
    assert torch.allclose(project_l1_box(delta, 1.5, -bounds, bounds), torch.tensor([0.5, -1, 0, 0]).view(1, 1, 2, 2))


def test_a_radius_of_nothing_leaves_nothing() -> None:
    delta = points(0, 1.0)
    assert torch.allclose(PROJECT["l1"](delta, 0.0), torch.zeros_like(delta), atol=1e-6)


@given(seed=seeds, share=st.floats(0, 1))
def test_steps_in_l1_move_the_largest_share_of_the_entries_alike(seed: int, share: float) -> None:
    gradient = points(seed, 1.0)
    step = ascend_l1(gradient, share).flatten(1)
    moved = max(1, int(share * step.shape[1]))
    assert (step != 0).sum(dim=1).tolist() == [moved] * len(step)
    assert torch.allclose(step.abs().amax(dim=1), torch.full((len(step),), 1 / moved))
    smallest = gradient.flatten(1).abs().masked_fill(step == 0, torch.inf).amin(dim=1)
    left = gradient.flatten(1).abs().masked_fill(step != 0, -torch.inf).amax(dim=1)
    assert bool((smallest >= left).all()) and bool((step * gradient.flatten(1) >= 0).all())


def test_each_image_may_have_a_share_of_its_own() -> None:
    gradient = points(0, 1.0)
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    together = ascend_l1(gradient, torch.tensor(shares))
    for row, share in enumerate(shares):
        assert torch.equal(together[row : row + 1], ascend_l1(gradient[row : row + 1], share))
