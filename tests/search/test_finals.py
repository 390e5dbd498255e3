from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.search import fakes
from tests.search.test_front import point
from toolkit import bundle
from toolkit.config import HardenConfig, ModelConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.latency import LatencyRow
from toolkit.evaluators.timing import Interval
from toolkit.pipeline import check_settings
from toolkit.search import finals, report
from toolkit.search.finals import full_evidence, most_promising
from toolkit.search.front import Limits, Point
from toolkit.search.objective import Job, Laboratory
from toolkit.search.report import Candidate, SearchResult
from toolkit.search.runner import excess_of, on_machine
from toolkit.search.space import Parameters
from toolkit.search.storage import Tried


def evidence(found: Point) -> Candidate:
    """As the cheap evidence had it."""
    return Candidate(found, found, Path(f"trial-{found.trial}"), {}, ())


def made(
    points: list[Point],
    limits: Limits,
    wanted: int,
    having: Callable[[Point], Candidate | None] = evidence,
    timing: Callable[[Sequence[Candidate]], list[Candidate]] = list,
) -> list[int]:
    return [one.point.trial for one in most_promising(points, limits, wanted, having, timing)]


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


def test_a_point_of_which_no_bundle_can_be_made_gives_its_place_to_the_next() -> None:
    def lacking(found: Point) -> Candidate | None:
        return None if found.trial in (0, 2) else evidence(found)

    assert made([point(number) for number in range(5)], Limits(), 2, lacking) == [1, 3]
    assert made([point(0), point(2)], Limits(), 2, lacking) == []


def test_limits_are_kept_by_the_times_side_by_side() -> None:
    """A bundle that keeps the limit by its own benchmark alone does not end the search for one that keeps it."""
    timed = list[list[int]]()

    def slower(candidates: Sequence[Candidate]) -> list[Candidate]:
        timed.append([one.point.trial for one in candidates])
        times = {0: 1.2, 1: 1.1, 2: 0.9, 3: 0.8}
        return [replace(one, point=replace(one.point, milliseconds=times[one.point.trial])) for one in candidates]

    points = [point(number, ms=0.95) for number in range(4)]
    assert made(points, Limits(max_latency=1.0), 1, evidence, slower) == [0, 1]
    assert timed == [[0], [0, 1]], "twice as many as wanted, none of which keeps it"
    timed.clear()
    assert made(points, Limits(max_latency=1.0), 2, evidence, slower) == [0, 1, 2]
    assert timed == [[0, 1], [0, 1, 2]]


def test_times_of_several_machines_are_brought_to_one() -> None:
    """On a machine half as fast a graph takes twice as long, and so does the original."""
    quick, slow, third = (
        replace(point(number, ms=ms), ratio=Interval(ratio, ratio, ratio))
        for number, ms, ratio in ((1, 0.9, 0.6), (2, 0.9, 0.3), (3, 1.2, 0.8))
    )
    assert [on_machine(one, 1.5).milliseconds for one in (quick, slow, third)] == pytest.approx([0.9, 0.45, 1.2])


def test_load_while_a_trial_was_timed_does_not_overstep_a_limit() -> None:
    """Its graph and the original took three times as long as they take alone."""
    job = Job(0, fakes.a_space().config({"prune.ratio": 0.5, "precision": "int8"}))
    record = {**fakes.measured(job).record(), "milliseconds": 3.0}
    assert record["ratio"]["value"] == 0.25
    assert excess_of(Limits(max_latency=0.3), 1.0, [record]) == {"--max-latency": pytest.approx(0.25 / 0.3 - 1)}


def tried(*ratios: float) -> list[Tried]:
    found = []
    for number, ratio in enumerate(ratios):
        parameters: Parameters = {"prune.ratio": ratio, "precision": "int8"}
        measured = fakes.measured(Job(number, fakes.a_space().config(parameters)))
        found.append(Tried(number, parameters, [measured.record()], None))
    return found


@dataclass
class World:
    """A search whose bundles cost nothing."""

    folder: Path
    images: str = "of the data set"
    written: list[str] = field(default_factory=list)
    failing: dict[int, Exception] = field(default_factory=dict)
    resumed: bool = False

    def laboratory(self) -> Laboratory:
        whole = SimpleNamespace(evaluation=SimpleNamespace(labelled_digest=self.images))
        return cast("Laboratory", SimpleNamespace(alone_ms=1.0, prepared=None, whole=whole))

    def search(self, wanted: int = 2, *, identity: str = "this", ratios: tuple[float, ...] = (0.3, 0.6, 0.9)) -> Any:
        (self.folder / "bundles").mkdir(parents=True, exist_ok=True)
        config = fakes.config(bundles=wanted)
        identified = {"search": identity}
        return full_evidence(config, self.folder, self.laboratory(), fakes.a_space(), tried(*ratios), identified)

    def write(self, _how: HardenConfig, _laboratory: Laboratory, folder: Path) -> None:
        number = int(folder.name.removeprefix("trial-"))
        if number in self.failing:
            raise self.failing[number]
        self.resumed = bundle.workspace_of(folder).training_checkpoint.is_file()
        self.written.append(folder.name)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    found = World(tmp_path / "out")

    def rows(_config: object, _laboratory: object, candidates: Sequence[Candidate]) -> tuple[LatencyRow, ...]:
        first = LatencyRow("", "cpu", 1, 1, 1.0, 1.0, 1.0, 1000.0, 9, 9, "original", 1.0, 1.0, 1.0, 0.0)
        return tuple(replace(first, file=str(one.point.trial)) for one in candidates)

    monkeypatch.setattr(finals, "_write", found.write)
    monkeypatch.setattr(finals, "_time", rows)
    monkeypatch.setattr(finals, "_is_written", lambda folder, _: folder.name in found.written)
    monkeypatch.setattr(finals, "_point", lambda trial, *_: point(trial))
    monkeypatch.setattr(finals, "_alarms", lambda _: ())
    monkeypatch.setattr(finals, "resolve", lambda config, _: config)
    monkeypatch.setattr(bundle, "read_report", lambda _: None)
    return found


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ToolkitError("it diverges", found="nan", fix="tune less"), "it diverges: nan"),
        (RuntimeError("out of memory"), "a defect: RuntimeError: out of memory"),
    ],
)
def test_a_bundle_that_cannot_be_made_is_told_and_the_others_are_made(
    error: Exception, reason: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    order = [one.point.trial for one in world.search(3).candidates]
    world.failing, world.images = {order[0]: error}, "others, so that all are made anew"
    found: SearchResult = world.search()
    assert [one.point.trial for one in found.candidates] == order[1:]
    assert f"no bundle of trial {order[0]}: {reason}" in capsys.readouterr().err
    data = json.loads(json.dumps(report.record(found)))
    assert data["without_bundle"] == [{"trial": order[0], "reason": reason}]
    for text in (report.render(found), report.render_markdown(found)):
        assert f"NO BUNDLE of trial {order[0]}: {reason}" in text


def test_no_bundle_at_all_or_a_full_disk_ends_the_search(world: World) -> None:
    world.failing = dict.fromkeys(range(3), ToolkitError("it diverges", found="nan", fix="tune less"))
    with pytest.raises(ToolkitError, match="no bundle could be made") as caught:
        world.search()
    assert all(f"trial {number}: it diverges: nan" in caught.value.found for number in range(3))
    world.failing = dict.fromkeys(range(3), OSError(28, "No space left on device"))
    with pytest.raises(ToolkitError, match="the disk is full"):
        world.search()


def test_a_bundle_that_was_judged_on_other_images_is_made_anew(world: World) -> None:
    world.search()
    first = list(world.written)
    world.search()
    assert world.written == first, "it is there"
    world.images = "as many others"
    world.search()
    assert world.written == [*first, *first]


@pytest.mark.parametrize(
    ("identity", "ratio", "resumed"), [("this", 0.3, True), ("another", 0.3, False), ("this", 0.6, False)]
)
def test_what_is_half_done_goes_on_if_it_is_of_this_search_and_trial(
    identity: str, ratio: float, resumed: bool, world: World
) -> None:
    world.failing = {0: ToolkitError("cut short", found="", fix="")}
    with pytest.raises(ToolkitError):
        world.search(1, ratios=(0.3,))
    checkpoint = bundle.workspace_of(world.folder / "bundles" / "trial-000").training_checkpoint
    checkpoint.parent.mkdir()
    checkpoint.touch()
    world.failing = {}
    world.search(1, identity=identity, ratios=(ratio,))
    assert world.written == ["trial-000"] and world.resumed is resumed
    assert [file.name for file in (world.folder / finals.ORIGINS).iterdir()] == ["trial-000"]


def test_a_trial_that_came_to_a_float_graph_can_be_made_again() -> None:
    """With `--int8 --qat --allow-float` the float graph may be the better one, as `precision` finds out."""
    values: dict[str, Any] = {"quantize": {"int8": False}, "finetune": {"qat": True}, "allow_float": True}
    config = HardenConfig(model=ModelConfig(path=Path("model.pt")), **values)
    check_settings(config)
    refused = config.model_copy(update={"allow_float": False})
    with pytest.raises(ToolkitError, match="would be a float graph"):
        check_settings(refused)
    values["quantize"]["per_channel"] = False
    with pytest.raises(ToolkitError, match="scale for every output channel"):
        check_settings(HardenConfig(model=ModelConfig(path=Path("model.pt")), **values))
