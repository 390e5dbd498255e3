"""Projections onto a hyperplane within a box, against linear programs and a root that scipy finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, linprog
from torch import Tensor

from toolkit.attacks.boundary import FARTHEST, Box, displacement

NORMS = ("linf", "l2", "l1")
ORDER = {"linf": np.inf, "l2": 2, "l1": 1}
Array = npt.NDArray[Any]
seeds = st.integers(0, 2**31)


def a_task(seed: int, size: int = 6) -> tuple[Tensor, Tensor, Box]:
    """Weights with zeros among them, a value of either sign, and bounds some of which are 0."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, size, generator=generator)
    weight[torch.rand(weight.shape, generator=generator) < 0.2] = 0
    points = torch.rand(3, size, generator=generator).mul(1.4).sub(0.2).clamp(0, 1)
    return weight, torch.randn(3, generator=generator), Box(-points, 1 - points)


def smallest(norm: str, weight: Array, value: float, low: Array, high: Array) -> float:
    """The least norm of d with weight · d + value = 0 in the box; nan if there is none."""
    size = len(weight)
    gain = np.sign(-value) * weight
    most = np.where(gain > 0, high * gain, low * gain).sum()
    if most < abs(value):
        return float("nan")
    if norm == "l2":

        def lacks(level: float) -> float:
            return float((gain * np.clip(level * gain, low, high)).sum() - abs(value))

        level = brentq(lacks, 0, 1e9, xtol=1e-14)
        return float(np.linalg.norm(np.clip(level * gain, low, high)))
    # l-inf: minimise t with -t <= d <= t; l1: minimise the sum of u with -u <= d <= u
    bounds = 1 if norm == "linf" else size
    above = np.eye(size) if norm == "l1" else np.ones((size, 1))
    found = linprog(
        np.r_[np.zeros(size), np.ones(bounds)],
        A_ub=np.block([[np.eye(size), -above], [-np.eye(size), -above]]),
        b_ub=np.zeros(2 * size),
        A_eq=np.r_[weight, np.zeros(bounds)][None],
        b_eq=[-value],
        bounds=[*zip(low, high, strict=True), *[(0, None)] * bounds],
    )
    return float(found.fun)


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=60, deadline=None)
@given(seed=seeds)
@example(seed=356)  # a row out of reach with a weight of 0 beside a row that needs several passes
def test_it_is_the_smallest_that_reaches_the_boundary_within_the_box(norm: str, seed: int) -> None:
    weight, value, box = a_task(seed)
    moved = displacement(norm, weight, value, box)
    assert bool((moved >= box.low).all() and (moved <= box.high).all())
    for row in range(len(weight)):
        low, high = box.low[row].double().numpy(), box.high[row].double().numpy()
        best = smallest(norm, weight[row].double().numpy(), float(value[row]), low, high)
        reached = float((weight[row] * moved[row]).sum() + value[row])
        if np.isnan(best):
            corner = torch.where(weight[row] * value[row] < 0, box.high[row], box.low[row])
            expected = torch.where(weight[row] == 0, 0, corner)
            assert torch.allclose(moved[row], expected), "beyond reach: as near as the box lets it"
        else:
            assert reached == pytest.approx(0, abs=1e-5)
            assert float(moved[row].norm(p=ORDER[norm])) == pytest.approx(best, abs=2e-5)


@pytest.mark.parametrize("norm", NORMS)
@given(seed=seeds, factor=st.sampled_from([1e-30, 1e-6, 1.0, 1e20]))
def test_without_a_box_it_is_the_closed_form_at_any_size_of_gradient(norm: str, seed: int, factor: float) -> None:
    weight, value, _ = a_task(seed)
    weight[:, 0] = 1.0
    moved = displacement(norm, factor * weight, factor * value, None)
    dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    distance = value.abs() / weight.norm(p=dual, dim=1)
    assert torch.allclose(moved.norm(p=ORDER[norm], dim=1), distance, rtol=1e-4)
    assert torch.allclose((weight * moved).sum(dim=1), -value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_wide_box_is_no_box(norm: str) -> None:
    weight, value, _ = a_task(3)
    wide = Box(torch.full_like(weight, -100), torch.full_like(weight, 100))
    assert torch.allclose(displacement(norm, weight, value, wide), displacement(norm, weight, value, None), atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("boxed", [True, False])
def test_without_a_gradient_or_on_the_boundary_nothing_moves(norm: str, boxed: bool) -> None:
    weight, value, box = a_task(1)
    bounds = box if boxed else None
    zeros = torch.zeros_like(weight)
    assert torch.equal(displacement(norm, zeros, value, bounds), zeros)
    assert torch.equal(displacement(norm, weight, torch.zeros_like(value), bounds), zeros)


@pytest.mark.parametrize("norm", NORMS)
def test_a_boundary_out_of_all_reach_stays_finite(norm: str) -> None:
    weight, value, _ = a_task(1)
    moved = displacement(norm, 1e-30 * weight, value, None)
    assert float(moved.abs().max()) == FARTHEST


@pytest.mark.parametrize("norm", NORMS)
def test_single_rows_and_batches_agree(norm: str) -> None:
    weight, value, box = a_task(5, size=200)
    together = displacement(norm, weight, value, box)
    for row in range(len(weight)):
        part = slice(row, row + 1)
        alone = displacement(norm, weight[part], value[part], Box(box.low[part], box.high[part]))
        assert torch.allclose(alone, together[part], atol=1e-6)
