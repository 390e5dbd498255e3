from __future__ import annotations

from typing import Any

import pytest

from tests.search.fakes import a_space
from toolkit.config import HardenConfig
from toolkit.search import untried
from toolkit.search.space import Space, digest
from toolkit.search.untried import Untried


def test_the_last_point_of_a_small_space_is_found_and_then_none() -> None:
    space = a_space("prune.ratio=0.002:0.8:0.002; precision=int8")
    points = list(space.points())
    assert len(points) == space.size == 400 <= untried.DRAWS
    names = [digest(space.config(point)) for point in points]
    search = Untried(space, 0)
    for left in (0, 137, 399):  # among so many, random draws would miss a single one every third time
        found = search.find(frozenset(names) - {names[left]}, draw=left)
        assert found == points[left]
    assert search.find(frozenset(names), draw=0) is None and search.is_exhausted(frozenset(names))
    assert not search.is_exhausted(frozenset(names[1:])), "a trial was given up meanwhile"


@pytest.mark.parametrize("draws", [1, 500])
def test_a_space_without_untried_points_is_not_looked_through_again(
    draws: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untried, "DRAWS", draws)
    space, made = a_space("prune.ratio=0.2:0.8:0.2; precision=int8"), list[object]()
    tried, config = frozenset(digest(space.config(point)) for point in space.points()), Space.config

    def noted(*parts: Any) -> HardenConfig:
        made.append(parts)
        return config(*parts)

    monkeypatch.setattr(Space, "config", noted)
    search = Untried(space, 0)
    assert search.find(tried, draw=0) is None
    made.clear()
    assert search.find(tried, draw=1) is None and made == []
