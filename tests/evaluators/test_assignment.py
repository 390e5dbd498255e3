from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.evaluators import assignment
from toolkit.evaluators.assignment import Assignment, fewest, find_assignment
from toolkit.evaluators.judge import Drop, Judge
from toolkit.evaluators.latency import Stopclock
from toolkit.evaluators.timing import FloatArray
from toolkit.exporters.quantize import Quantizer

Cost = Callable[[frozenset[str]], float]
FLOAT_TWIN = 10.0


class Writer:
    """Stands for a quantiser: its graphs are lists of the layers that are float."""

    def __init__(self, *layers: str, kept: tuple[str, ...] = ()) -> None:
        self.layers, self.kept, self.written = layers, kept, list[frozenset[str]]()

    def write(self, path: Path, *, keep_float: Collection[str] = ()) -> None:
        if path.name.startswith("assignment"):  # what is timed; others are looked at once
            self.written.append(frozenset(keep_float))
        path.write_text(" ".join(keep_float))


class Clock:
    """Times as a function of the layers that are float; noise that all files of a round share."""

    def __init__(self, cost: Cost, noise: float = 0.3) -> None:
        self._cost, self._random, self._noise = cost, np.random.default_rng(0), noise
        self.files = 0
        self.foreign_load = 0.2

    def rounds(self, files: Mapping[str, Path], count: int) -> dict[str, FloatArray]:
        drift = np.exp(self._noise * self._random.standard_normal(count))
        self.files += len(files)
        own = {name: np.exp(0.001 * self._random.standard_normal(count)) for name in files}
        return {name: drift * own[name] * self._time(path) for name, path in files.items()}

    def _time(self, path: Path) -> float:
        return FLOAT_TWIN if path.name == "fp32" else self._cost(frozenset(path.read_text().split()))


class Losses:
    """What is lost by layers that are integer, which adds up."""

    images, margin_images = 100, 40

    def __init__(self, lost: Mapping[str, float]) -> None:
        self._lost = lost

    def drop(self, path: Path, *, short: bool = False) -> Drop:
        del short
        return Drop(0.0, self.noise(path))

    def exceeds(self, path: Path, allowed: float) -> bool:
        return self.noise(path) > allowed

    def disturbance(self, path: Path) -> float:
        return 2 * self.noise(path)

    def noise(self, path: Path) -> float:
        return sum(lost for name, lost in self._lost.items() if name not in path.read_text().split())


def search(
    folder: Path, writer: Writer, cost: Cost, lost: Mapping[str, float] | None = None, **how: Any
) -> tuple[Assignment, Clock]:
    (folder / "fp32").write_text("")
    clock = Clock(cost)
    judge = cast("Judge", Losses(lost or {}))
    how = {"max_drop": 0.01, **how}
    found = find_assignment(cast("Quantizer", writer), folder / "fp32", folder, judge, cast("Stopclock", clock), **how)
    return found, clock


def test_layers_that_are_faster_in_float_are_left_float(tmp_path: Path) -> None:
    gain = {"a": 3.0, "b": -1.0, "c": 0.5, "d": -2.0}
    writer = Writer("a", "b", "c", "d")
    found, _ = search(tmp_path, writer, lambda kept: 8.0 - sum(gain[name] for name in kept))
    assert found.keep_float == ("a", "c") and found.for_accuracy == () and found.pays
    assert found.ratio.value == pytest.approx(0.45, rel=0.01)
    assert found.all_integer.value == pytest.approx(0.8, rel=0.01)
    assert len(set(writer.written)) == len(writer.written) == found.tried, "nothing is written twice"


def test_a_layer_may_become_an_integer_again(tmp_path: Path) -> None:
    """In float, b pays alone, but not beside a and c."""
    times = {"": 8.0, "b": 6.0, "a": 7.0, "c": 7.5, "a b": 5.5, "a b c": 5.0, "a c": 4.0, "b c": 7.0}
    found, _ = search(tmp_path, Writer("a", "b", "c", "d"), lambda kept: times.get(" ".join(sorted(kept)), 9.0))
    assert found.keep_float == ("a", "c")


def test_where_integers_are_slow_the_search_begins_again_with_one(tmp_path: Path) -> None:
    """Changes between the kinds cost as much as the tensor there is large: any one layer less adds a dearer change."""
    changes = (0.2, 4.0, 4.0, 4.0, 1.5, 0.0)  # before a, between the layers, behind e

    def cost(kept: frozenset[str]) -> float:
        integer = [name not in kept for name in "abcde"]
        kinds = itertools.pairwise([False, *integer, False])
        between = sum(price for price, (one, other) in zip(changes, kinds, strict=True) if one != other)
        return FLOAT_TWIN + 2.0 * sum(integer[:4]) + 0.5 * integer[4] + between

    found, _ = search(tmp_path, Writer(*"abcde"), cost)
    assert found.keep_float == ("a", "b", "c", "d") and not found.pays
    assert found.ratio.value == pytest.approx(1.2, rel=0.01)
    assert found.all_integer.value == pytest.approx(1.87, rel=0.01)


def test_integers_that_pay_are_not_given_up(tmp_path: Path) -> None:
    """A single one would be no faster, and is not tried."""
    writer = Writer(*"abcde")
    found, _ = search(tmp_path, writer, lambda kept: 5.0 + len(kept))
    assert found.keep_float == () and max(map(len, writer.written)) == 1


def test_what_does_not_pay_is_said(tmp_path: Path) -> None:
    def outcome(seconds: float) -> tuple[tuple[str, ...], bool]:
        found, _ = search(tmp_path, Writer("a", "b"), lambda kept: seconds + len(kept))
        return found.keep_float, found.pays

    assert [outcome(seconds) for seconds in (9.0, 10.0, 12.0)] == [((), True), ((), False), ((), False)]


def test_where_accuracy_leaves_few_integers_those_are_taken_that_pay(tmp_path: Path) -> None:
    """Accuracy gives a and b up, and leaves c, which alone is slower than in float; b alone would be faster."""
    lost = {"a": 0.02, "b": 0.008, "c": 0.004}
    times = {"": 6.0, "c": 7.0, "a": 12.0, "b": 12.0, "a c": 9.0, "b c": 12.0, "a b": 11.0}  # by the float layers
    found, _ = search(tmp_path, Writer(*"abc"), lambda kept: times[" ".join(sorted(kept))], lost)
    assert found.keep_float == ("a", "c") and found.pays and found.holds
    assert found.ratio.value == pytest.approx(0.9, rel=0.01)


def test_layers_that_the_user_keeps_float_are_left_alone_and_one_stays_integer(tmp_path: Path) -> None:
    writer = Writer("a", "b", "c", kept=("b",))
    found, _ = search(tmp_path, writer, lambda kept: 8.0 - len(kept))
    assert len(found.keep_float) == 1 and not any("b" in kept for kept in writer.written)
    alone, _ = search(tmp_path, Writer("a"), lambda kept: 8.0 - len(kept))
    assert alone.keep_float == () and alone.tried == 1


def test_accuracy_is_bought_with_the_layers_that_disturb_most(tmp_path: Path) -> None:
    lost = {"a": 0.004, "b": 0.03, "c": 0.006, "d": 0.02}
    found, _ = search(tmp_path, Writer(*lost), lambda kept: 5.0 + len(kept), lost)
    assert found.for_accuracy == ("b", "d") and found.keep_float == ("b", "d")
    assert found.drop.robust == pytest.approx(0.01) and found.drop_all_integer.robust == pytest.approx(0.06)
    strict, _ = search(tmp_path, Writer(*lost), lambda kept: 5.0 + len(kept), lost, max_drop=0.0)
    assert len(strict.keep_float) == 3 and strict.drop.worst == pytest.approx(0.004), "one stays integer"


def test_a_deep_network_is_judged_a_dozen_times_at_most(tmp_path: Path) -> None:
    """Of 60 layers those 23 become float that lose most; the others lose half of what is allowed."""
    numbers = [int(number) for number in np.random.default_rng(0).permutation(60)]
    lost = {f"layer{number}": 0.01 if number < 23 else 0.5 * 0.01 / 37 for number in numbers}
    judged = list[Path]()

    class Counted(Losses):
        def exceeds(self, path: Path, allowed: float) -> bool:
            judged.append(path)
            return super().exceeds(path, allowed)

    (tmp_path / "fp32").write_text("")
    found = find_assignment(
        cast("Quantizer", Writer(*lost)),
        tmp_path / "fp32",
        tmp_path,
        cast("Judge", Counted(lost)),
        cast("Stopclock", Clock(lambda kept: 5.0 + len(kept))),
        max_drop=0.01,
        seconds=0.0,
    )
    assert set(found.for_accuracy) == {name for name, value in lost.items() if value == 0.01}
    assert len(judged) <= 12 and found.foreign_load == 0.2 and found.margin_images == 40


@given(most=st.integers(0, 300), wanted=st.integers(0, 400))
def test_the_fewest_that_suffice_are_found_in_twice_the_logarithm(most: int, wanted: int) -> None:
    asked = list[int]()

    def exceeds(count: int) -> bool:
        asked.append(count)
        return count < wanted

    assert fewest(exceeds, most) == min(wanted, most)
    assert len(asked) == len(set(asked)) <= 2 + 2 * math.log2(most + 1) and most not in asked


def test_layers_that_accuracy_asks_for_as_well_are_not_float_for_speed_alone(tmp_path: Path) -> None:
    """a and b are faster in float; were they integers, a would cost more than is allowed."""

    def cost(kept: frozenset[str]) -> float:
        return 8.0 - ("a" in kept) - ("b" in kept) + ("c" in kept)

    found, _ = search(tmp_path, Writer(*"abc"), cost, {"a": 0.02, "b": 0.001, "c": 0.001})
    assert found.keep_float == ("a", "b") and found.for_accuracy == ("a",)
    harmless, _ = search(tmp_path, Writer(*"abc"), cost, {"a": 0.002, "b": 0.001, "c": 0.001})
    assert harmless.keep_float == ("a", "b") and harmless.for_accuracy == ()


def test_layers_that_are_guilty_together_are_found(tmp_path: Path) -> None:
    """Both of a pair must be float before anything is gained; the third looks better than either alone."""

    class Pair(Losses):
        def noise(self, path: Path) -> float:
            kept = set(path.read_text().split())
            return 0.1 * ("c" not in kept) + (0.0 if {"a", "b"} <= kept else 0.9 + 0.01 * ("a" not in kept))

    (tmp_path / "fp32").write_text("")
    clock = cast("Stopclock", Clock(lambda kept: 5.0 + len(kept)))
    judge = cast("Judge", Pair({}))
    made = cast("Quantizer", Writer(*"abcd"))
    found = find_assignment(made, tmp_path / "fp32", tmp_path, judge, clock, max_drop=0.05)
    assert found.for_accuracy == ("c", "a", "b") and found.keep_float == ("a", "b", "c")


def test_every_layer_s_sensitivity_is_told_as_far_as_the_time_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = {"a": 0.001, "b": 0.003, "c": 0.0}
    found, _ = search(tmp_path, Writer(*lost), lambda kept: 5.0 + len(kept), lost)
    assert [one.layer for one in found.sensitivity] == ["a", "b", "c"]
    assert [one.relief for one in found.sensitivity] == pytest.approx([0.25, 0.75, 0.0])
    assert [one.drop.robust for one in found.sensitivity if one.drop] == pytest.approx([0.001, 0.003, 0.0])
    monkeypatch.setattr(assignment, "SENSITIVITY_S", 0.0)
    hurried, _ = search(tmp_path, Writer(*lost), lambda kept: 5.0 + len(kept), lost)
    assert [one.drop for one in hurried.sensitivity] == [None] * 3
    assert [one.relief for one in hurried.sensitivity] == pytest.approx([0.25, 0.75, 0.0])


def test_a_search_whose_time_is_up_keeps_what_it_has(tmp_path: Path) -> None:
    writer = Writer(*"abcdefgh")
    found, clock = search(tmp_path, writer, lambda kept: 8.0 - len(kept), seconds=0.0)
    assert found.keep_float == () and found.tried == 1 and clock.files <= 4


def test_of_a_deep_network_the_ends_are_tried_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time for two candidates besides the present one."""
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: 2.0 * next(ticks))  # two files: a second each; two to write one
    writer = Writer(*"abcdefgh")
    seconds = 3.1 * (assignment.SCREENING_ROUNDS + 2.0) / assignment.FIRST_SHARE
    search(tmp_path, writer, lambda kept: 8.0 + len(kept), seconds=seconds)
    assert set(writer.written) == {frozenset(), frozenset("a"), frozenset("h")}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=2, max_size=5))
def test_with_times_that_add_up_the_fastest_of_all_assignments_is_found(
    tmp_path_factory: pytest.TempPathFactory, gains: list[float]
) -> None:
    names = "abcde"[: len(gains)]
    gain = dict(zip(names, (round(value, 1) for value in gains), strict=True))

    def cost(kept: frozenset[str]) -> float:
        return 20.0 - sum(gain[name] for name in kept)

    every = [frozenset(some) for size in range(len(names)) for some in itertools.combinations(names, size)]
    found, _ = search(tmp_path_factory.mktemp("search"), Writer(*names), cost)
    assert cost(frozenset(found.keep_float)) <= min(map(cost, every)) + 0.1 * len(names)


def test_once_accuracy_made_layers_float_others_may_be_faster_so_too(tmp_path: Path) -> None:
    """Alone, c is faster in integers; beside a float b, which accuracy asks for, it is slower."""

    def cost(kept: frozenset[str]) -> float:
        return 6.0 + ("a" in kept) + 2.0 * ("b" in kept) - (1.0 if {"b", "c"} <= kept else -1.0 * ("c" in kept))

    found, _ = search(tmp_path, Writer("a", "b", "c"), cost, {"b": 0.5})
    assert found.keep_float == ("b", "c") and found.for_accuracy == ("b",)
    assert found.drop.worst <= 0.01


def test_a_faster_choice_that_loses_more_is_not_taken(tmp_path: Path) -> None:
    """As above, but with c in float as well errors no longer cancel."""

    def cost(kept: frozenset[str]) -> float:
        return 6.0 + ("a" in kept) + 2.0 * ("b" in kept) - (1.0 if {"b", "c"} <= kept else -1.0 * ("c" in kept))

    class Cancelling(Losses):
        def noise(self, path: Path) -> float:
            return super().noise(path) + 0.02 * ("c" in path.read_text().split())

    (tmp_path / "fp32").write_text("")
    judge, clock = cast("Judge", Cancelling({"b": 0.5})), cast("Stopclock", Clock(cost))
    found = find_assignment(
        cast("Quantizer", Writer("a", "b", "c")), tmp_path / "fp32", tmp_path, judge, clock, max_drop=0.01
    )
    assert found.keep_float == ("b",) and found.holds


def test_files_that_lost_are_removed_where_room_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def left(room: int) -> int:
        folder = tmp_path / str(room)
        folder.mkdir()
        monkeypatch.setattr(assignment, "ROOM", room)
        found, _ = search(folder, Writer("a", "b", "c"), lambda kept: 8.0 + len(kept) - 2 * ("a" in kept))
        assert found.keep_float == ("a",)
        return len(list(folder.glob("assignment-*")))

    assert left(0) < left(2**20) == 6


def test_what_was_found_is_kept_for_its_float_twin_alone(tmp_path: Path) -> None:
    found, _ = search(tmp_path, Writer("a", "b"), lambda kept: 8.0 - ("a" in kept), {"a": 0.1})
    path, other = tmp_path / "kept.json", tmp_path / "other"
    other.write_text("another network")
    assert Assignment.read(path, tmp_path / "fp32", "so") is None
    found.write(path, tmp_path / "fp32", "so")
    assert Assignment.read(path, tmp_path / "fp32", "so") == found
    assert Assignment.read(path, tmp_path / "fp32", "otherwise") is None
    assert Assignment.read(path, other, "so") is None
    older = json.loads(path.read_text())
    del older["found"]["sensitivity"]
    path.write_text(json.dumps(older))
    assert Assignment.read(path, tmp_path / "fp32", "so") is None, "of a version that did not know it"
    path.write_text("{cut sh")
    assert Assignment.read(path, tmp_path / "fp32", "so") is None
