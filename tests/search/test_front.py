from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.artifacts import Proportion
from toolkit.evaluators.timing import Interval
from toolkit.search.front import Limits, Point, distances, dominates, finalists, pareto, recommend


def point(trial: int, clean: int = 90, robust: int = 70, ms: float = 1.0, size: int = 1000) -> Point:
    return Point(
        trial, Proportion(clean, 100), Proportion(robust, 100), ms, Interval(ms, 0.9 * ms, 1.1 * ms), size, True
    )


points = st.lists(
    st.builds(
        point,
        st.integers(0, 10**6),
        st.integers(0, 100),
        st.integers(0, 100),
        st.floats(0.1, 10),
        st.integers(1, 1000),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda one: one.trial,
)


@given(points)
def test_the_front_is_what_nothing_dominates_and_dominates_the_rest(found: list[Point]) -> None:
    front = pareto(found)
    assert front
    assert not any(dominates(one, other) for one in found for other in front)
    assert all(any(dominates(one, other) for one in front) for other in found if other not in front)


@given(points)
def test_finalists_are_the_front_each_once_and_the_recommended_first(found: list[Point]) -> None:
    ordered = finalists(found, Limits())
    assert sorted(one.trial for one in ordered) == sorted(one.trial for one in pareto(found))
    assert ordered[0] == recommend(found, Limits()).point


def test_limits_say_what_is_enough() -> None:
    accurate, fast, slow = point(1, clean=95, ms=0.5), point(2, clean=91, ms=0.2), point(3, clean=99, ms=5)
    best = recommend([accurate, fast, slow], Limits(min_accuracy=0.9, min_robust=0.6, max_size=2000))
    assert best.keeps and best.point is fast, "accuracy beyond the limit counts no more"
    best = recommend([accurate, fast, slow], Limits(min_accuracy=0.94, min_robust=0.6, max_size=2000))
    assert best.point is accurate
    best = recommend([accurate, fast, slow], Limits(max_latency=1.0, max_size=2000, min_robust=0.1))
    assert best.point is accurate, "the most accurate that is fast enough"


def test_without_limits_the_point_nearest_to_the_best_of_everything_is_recommended() -> None:
    best = recommend([point(1, robust=90, ms=10), point(2, robust=85, ms=1), point(3, robust=20, ms=0.9)], Limits())
    assert best.point.trial == 2
    assert "trial 1 is better in robust accuracy (5.00 points, within the interval)" in best.why
    assert "trial 3 is better in latency (10% less)" in best.why


def test_where_nothing_keeps_the_limits_the_nearest_is_named_with_what_it_misses() -> None:
    limits = Limits(min_robust=0.8, max_latency=1.0)
    best = recommend([point(1, robust=79, ms=1.1), point(2, robust=90, ms=4), point(3, robust=10, ms=0.1)], limits)
    assert not best.keeps and best.point.trial == 1
    assert "--min-robust by 1.00 points" in best.why and "--max-latency by 10.0%" in best.why


@pytest.mark.parametrize(
    ("limits", "flag"),
    [
        (Limits(min_accuracy=0.91), "--min-accuracy"),
        (Limits(min_robust=0.71), "--min-robust"),
        (Limits(max_latency=0.9), "--max-latency"),
        (Limits(max_size=999), "--max-size"),
    ],
)
def test_every_limit_binds(limits: Limits, flag: str) -> None:
    assert not limits.kept(point(1)) and limits.excess(point(1))[flag] > 0
    assert Limits(0.9, 0.7, 1.0, 1000).kept(point(1)), "at the limit is within it"


def test_a_point_may_keep_limits_within_its_intervals() -> None:
    assert Limits(min_robust=0.75).may_keep(point(1)) and not Limits(min_robust=0.9).may_keep(point(1))
    assert Limits(max_latency=0.95).may_keep(point(1)) and not Limits(max_latency=0.5).may_keep(point(1))


def test_finalists_that_keep_the_limits_come_first() -> None:
    found = [point(1, robust=50, ms=0.1), point(2, robust=75, ms=2), point(3, robust=90, ms=3)]
    assert [one.trial for one in finalists(found, Limits(min_robust=0.7))] == [2, 3, 1]


def shares(trial: int, clean: int, robust: int, ms: float = 1.0, size: int = 1000) -> Point:
    """On 10,000 images."""
    found = point(trial, ms=ms, size=size)
    return replace(found, clean=Proportion(clean, 10_000), robust=Proportion(robust, 10_000))


@pytest.mark.parametrize(
    ("better", "other"),
    [
        (shares(2, 9000, 7000), shares(1, 9001, 6000)),  # an image against ten points
        (shares(2, 9000, 7000, ms=1.001), shares(1, 9000, 6000, ms=1.0)),
        (shares(2, 9000, 7000, size=1001), shares(1, 9000, 6000, size=1000)),
    ],
)
def test_a_difference_that_nobody_can_measure_outweighs_none_that_everybody_sees(better: Point, other: Point) -> None:
    """Of two points each is the best in something: by their range alone, the two would be equally far."""
    best = recommend([other, better], Limits())
    assert best.point is better
    assert finalists([other, better], Limits())[0] is better


def test_differences_within_what_can_be_told_count_in_proportion() -> None:
    found = distances([shares(1, 9000, 6000), shares(2, 9030, 6000), shares(3, 9060, 6000)], ("clean",))
    assert 0 == found[3] < found[2] < found[1] < 1
    assert found[1] == pytest.approx(2 * found[2])


def test_why_says_which_differences_are_within_the_interval() -> None:
    best = recommend([shares(1, 9001, 6000), shares(2, 9000, 7000)], Limits())
    assert "trial 1 is better in clean accuracy (0.01 points, within the interval)" in best.why
