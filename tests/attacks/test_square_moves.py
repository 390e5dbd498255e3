from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toolkit.attacks.projections import NORM
from toolkit.attacks.square_moves import MOVES, STARTS, bumps, side_near_boundary, side_of_square, windows

POWERS = {"l2": 2, "l1": 1}
seeds = st.integers(0, 10_000)


def a_perturbation(seed: int, norm: str, eps: float, shape: tuple[int, ...] = (5, 3, 9, 9)) -> Tensor:
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return delta * (0.8 * eps / NORM[norm](delta).view(-1, 1, 1, 1))


def test_squares_shrink_as_in_the_paper() -> None:
    shape = torch.Size((1, 3, 32, 32))
    shares = {0: 0.8, 11: 0.4, 51: 0.2, 201: 0.1, 501: 0.05, 1001: 0.025, 2001: 0.0125, 4001: 0.00625, 8001: 0.0015625}
    for query, share in shares.items():
        assert side_of_square(query, 10_000, shape) == max(1, min(31, round((share * 1024) ** 0.5)))
    assert side_of_square(1, 10, torch.Size((1, 1, 2, 2))) == 1


@given(seeds, st.integers(1, 9))
def test_windows_are_squares_within_the_image(seed: int, side: int) -> None:
    inside = windows(torch.Size((6, 3, 9, 10)), side, torch.Generator().manual_seed(seed))
    assert inside.shape == (6, 1, 9, 10)
    assert (inside.any(dim=3).sum(dim=(1, 2)) == side).all() and (inside.any(dim=2).sum(dim=(1, 2)) == side).all()
    assert (inside.sum(dim=(1, 2, 3)) == side * side).all()


def test_windows_come_to_every_corner() -> None:
    inside = windows(torch.Size((500, 1, 4, 4)), 3, torch.Generator().manual_seed(0))
    corners = inside[:, 0][:, [0, 0, 3, 3], [0, 3, 0, 3]]
    assert corners.sum(dim=0).min() > 90 and (corners.sum(dim=1) == 1).all()


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 12])
@pytest.mark.parametrize("power", [2, 1])
def test_bumps_are_of_opposite_sign_and_size_1(side: int, power: int) -> None:
    pattern = bumps(side, power)
    assert pattern.shape == (side, side)
    assert float(pattern.abs().pow(power).sum()) == pytest.approx(1, abs=1e-5)
    assert bool((pattern[: side // 2] >= 0).all()) and bool((pattern[side // 2 :] <= 0).all())


def test_the_bumps_of_three_pixels_by_hand() -> None:
    """Squares of one and three pixels around (0, 1) and (1, 1), weighing 1 and 1/4: 1.25 in the middle, 0.25 around."""
    above = torch.tensor([[0.25, 1.25, 0.25]])
    below = torch.tensor([[0.25, 0.25, 0.25], [0.25, 1.25, 0.25]])
    expected = torch.cat((above / above.norm(), -below / below.norm())) / 2**0.5
    assert torch.allclose(bumps(3, 2), expected)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("shape", [(4, 3, 12, 10), (2, 1, 3, 3), (1, 1, 28, 28)])
def test_starts_are_at_the_radius_or_beyond_and_signs_are_even(norm: str, shape: tuple[int, ...]) -> None:
    start = STARTS[norm](torch.zeros(shape), 0.3, torch.Generator().manual_seed(0))
    assert start.shape == shape
    expected = 0.6 if norm == "l1" else 0.3
    assert torch.allclose(NORM[norm](start), torch.full((shape[0],), expected), rtol=1e-4)


def test_linf_starts_are_stripes_and_moves_one_square_of_one_colour() -> None:
    generator = torch.Generator().manual_seed(0)
    start = STARTS["linf"](torch.zeros(4, 3, 6, 8), 0.1, generator)
    assert torch.equal(start, start[:, :, :1].expand_as(start))
    assert torch.allclose(start.abs(), torch.tensor(0.1))
    moved = MOVES["linf"](torch.zeros(4, 3, 6, 8), 3, 0.1, generator)
    assert ((moved != 0).sum(dim=(2, 3)) == 9).all()
    colours = moved.flatten(2)
    assert torch.allclose(colours.amax(dim=2) + colours.amin(dim=2), colours.sum(dim=2) / 9, atol=1e-6)


@pytest.mark.parametrize("norm", ["l2", "l1"])
@settings(max_examples=30)
@given(seed=seeds, side=st.integers(1, 9))
def test_moves_touch_two_windows_and_use_the_radius(norm: str, seed: int, side: int) -> None:
    eps = 0.7
    delta = a_perturbation(seed, norm, eps)
    moved = MOVES[norm](delta, side, eps, torch.Generator().manual_seed(seed))
    assert bool(moved.isfinite().all())
    if norm == "l2":
        assert torch.allclose(NORM["l2"](moved), torch.full((5,), eps), rtol=1e-4)
    # elsewhere entries keep their proportions
    ratio = moved / delta
    most = 2 * min(max(3, side + 1 - side % 2), 9) ** 2
    usual = ratio.flatten(1).median(dim=1).values if most < 40 else None
    if usual is not None:
        kept = (ratio - usual.view(-1, 1, 1, 1)).abs() < 1e-4
        assert bool(((~kept).any(dim=1).sum(dim=(1, 2)) <= most).all())


def test_mass_in_l1_is_kept_and_filled_up_to_the_radius() -> None:
    """With one channel the two windows get what they had and all that was left of the radius."""
    delta = a_perturbation(0, "l1", 1.0, (6, 1, 9, 9))
    moved = MOVES["l1"](delta, 3, 1.0, torch.Generator().manual_seed(0))
    assert torch.allclose(NORM["l1"](moved), torch.ones(6), rtol=1e-4)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_moves_from_nothing_give_bumps_alone(norm: str) -> None:
    moved = MOVES[norm](torch.zeros(3, 1, 9, 9), 3, 1.0, torch.Generator().manual_seed(0))
    assert ((moved != 0).sum(dim=(1, 2, 3)) <= 9).all()
    assert torch.allclose(NORM[norm](moved), torch.ones(3), rtol=1e-4)
    size = moved.abs().pow(POWERS[norm]).sum(dim=(1, 2, 3)).pow(1 / POWERS[norm])
    expected = bumps(3, POWERS[norm]).abs().flatten().sort().values
    for image, scale in zip(moved, size, strict=True):
        assert torch.allclose((image / scale).abs().flatten().sort().values[-9:], expected, atol=1e-5)


def test_near_the_boundary_squares_are_small_from_the_start() -> None:
    sides = [side_near_boundary(query, 1000, torch.Size((1, 1, 28, 28))) for query in (1, 299, 300, 599, 600, 999)]
    assert sides == [3, 3, 2, 2, 1, 1]
    assert side_near_boundary(1, 10, torch.Size((1, 3, 224, 224))) == 25
    assert side_near_boundary(1, 10, torch.Size((1, 3, 2, 2))) == 1
