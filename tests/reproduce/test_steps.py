from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit.reproduce.steps import Step

BASE = Step("train", "base", {"seed": 0})
PRUNED = Step("prune", "pruned", {"ratio": 0.5}, (BASE,))
TUNED = Step("train", "tuned", {"seed": 0}, (PRUNED, BASE))


def test_the_label_determines_nothing() -> None:
    assert Step("train", "other words", {"seed": 0}) == BASE


@pytest.mark.parametrize(
    "other",
    [
        Step("prune", "base", {"seed": 0}),
        Step("train", "base", {"seed": 1}),
        Step("train", "base", {"seed": 0, "more": None}),
        Step("train", "base", {"seed": 0}, (BASE,)),
    ],
)
def test_everything_else_does(other: Step) -> None:
    assert other != BASE


def test_a_change_of_a_parent_changes_the_child() -> None:
    other = Step("prune", "pruned", {"ratio": 0.5}, (Step("train", "base", {"seed": 1}),))
    assert other != PRUNED


def test_parents_come_first_and_once() -> None:
    assert [step.label for step in TUNED.walk()] == ["base", "pruned", "tuned"]


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.floats(allow_nan=False), st.text(), st.none())))
def test_the_order_of_settings_does_not_matter(settings: dict[str, Any]) -> None:
    backwards = dict(reversed(settings.items()))
    assert Step("train", "", settings) == Step("train", "", backwards)
