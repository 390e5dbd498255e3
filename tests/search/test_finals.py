from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.search.test_front import point
from toolkit.evaluators.timing import Interval
from toolkit.search.finals import comparable, most_promising
from toolkit.search.front import Limits, Point
from toolkit.search.report import Candidate


def evidence(found: Point) -> Candidate:
    """As the cheap evidence had it."""
    return Candidate(found, found, Path(f"trial-{found.trial}"), {}, ())


def made(points: list[Point], limits: Limits, wanted: int) -> list[int]:
    return [one.point.trial for one in most_promising(points, limits, wanted, evidence)]


def test_as_many_bundles_are_made_as_are_wanted() -> None:
    assert made([point(number) for number in range(5)], Limits(), 2) == [0, 1]
    assert made([point(0)], Limits(), 2) == [0]


def test_where_none_keeps_the_limits_those_that_may_follow() -> None:
    """A point that is too large cannot; that it comes first does not end the search for one that can."""
    large, weak, hopeful, other = point(1, size=1005), point(2, robust=20), point(3, robust=69), point(4, robust=68)
    limits = Limits(min_robust=0.7, max_size=1000)
    assert made([large, weak, hopeful, other], limits, 1) == [1, 3]
    assert made([large, weak, hopeful, other], limits, 2) == [1, 2, 3, 4]


def test_a_point_that_keeps_the_limits_is_enough() -> None:
    keeping, hopeful = point(1, robust=75), point(2, robust=69)
    assert made([keeping, hopeful], Limits(min_robust=0.7), 1) == [1]


def test_times_of_several_machines_are_brought_to_one() -> None:
    """On a machine half as fast a graph takes twice as long, and so does the original."""
    quick, slow, third = (
        replace(point(number, ms=ms), ratio=Interval(ratio, ratio, ratio))
        for number, ms, ratio in ((1, 0.9, 0.6), (2, 0.9, 0.3), (3, 1.2, 0.8))
    )
    found = comparable([quick, slow, third])
    assert [one.milliseconds for one in found] == pytest.approx([0.9, 0.45, 1.2])
    assert comparable([]) == []
