from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.training.schedules import SCHEDULES, WARM_UP, one_cycle, stepped


@given(st.integers(1, 3000))
def test_one_cycle_rises_then_falls_and_is_never_zero(total: int) -> None:
    rates = [one_cycle(step, total, 1) for step in range(total)]
    assert all(0 < rate <= 1 for rate in rates)
    peak = rates.index(max(rates))
    assert all(a < b for a, b in itertools.pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in itertools.pairwise(rates[peak:]))
    assert abs((peak + 1) / (total + 1) - WARM_UP) <= 1 / (total + 1) or total < 5


def test_one_cycle_is_linear_in_both_parts() -> None:
    rates = [one_cycle(step, 99, 1) for step in range(99)]
    assert rates[19] == pytest.approx(1) and rates[9] == pytest.approx(0.5)
    assert rates[59] == pytest.approx(0.5) and rates[98] == pytest.approx(1 / 80)


def test_stepped_is_the_papers() -> None:
    rates = [stepped(step, 200, 10) for step in range(200)]
    assert rates == [1.0] * 40 + [0.1] * 160


def test_the_names_of_schedules() -> None:
    assert set(SCHEDULES) == {"one-cycle", "stepped", "constant"}
    assert {SCHEDULES["constant"](step, 20, 1) for step in range(20)} == {1.0}
