from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from toolkit.errors import ToolkitError
from toolkit.reproduce import energy
from toolkit.reproduce.energy import Meter, Reading, joules
from toolkit.reproduce.protocol import PROTOCOLS
from toolkit.reproduce.steps import MODEL, Step
from toolkit.reproduce.store import Sittings, Store

STEP = Step("train", "a training", {"seed": 0})
PAPER = PROTOCOLS["paper"]


def test_what_is_finished_is_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "work", PAPER)
    assert store.result(STEP) is None
    with store.sitting(STEP) as sittings:
        pass
    store.finish(STEP, {"value": 1}, sittings)
    found = Store(tmp_path / "work", PAPER).result(STEP)
    assert found is not None and found["value"] == 1 and found["spent"]["count"] == 1
    assert json.loads((store.folder(STEP) / "step.json").read_text())["settings"] == {"seed": 0}


def test_the_folder_of_another_protocol_is_refused(tmp_path: Path) -> None:
    Store(tmp_path, PROTOCOLS["fast"]).begin()
    with pytest.raises(ToolkitError, match="the work folder is of another protocol") as error:
        Store(tmp_path, PAPER)
    assert "filled under the protocol fast, and this run is under paper" in error.value.found
    assert "--work DIR" in error.value.fix


def test_the_folder_of_another_version_is_refused_if_its_form_is_another(tmp_path: Path) -> None:
    Store(tmp_path, PAPER).begin()
    marker = json.loads((tmp_path / "reproduce.json").read_text())
    (tmp_path / "reproduce.json").write_text(json.dumps({**marker, "settings": "which every step knows for itself"}))
    Store(tmp_path, PAPER)
    for other in ({**marker, "format": 0}, "no marker"):
        (tmp_path / "reproduce.json").write_text(json.dumps(other))
        with pytest.raises(ToolkitError, match="of another protocol") as error:
            Store(tmp_path, PAPER)
        assert "another version of the toolkit" in error.value.found


def finish(store: Store, step: Step, **result: object) -> None:
    store.folder(step).mkdir(exist_ok=True)
    store.finish(step, dict(result), Sittings())


def test_a_figure_of_a_network_that_was_made_again_otherwise_is_mixed(tmp_path: Path) -> None:
    tuned = Step("train", "tuned", {}, (STEP,))
    figure = Step("measure", "a figure", {}, (tuned,))
    store = Store(tmp_path, PAPER)
    finish(store, STEP, weights_sha256="a")
    finish(store, tuned, weights_sha256="b")
    finish(store, figure)
    assert not store.is_mixed(figure)
    finish(store, STEP, weights_sha256="a")
    assert not store.is_mixed(figure), "the same came out"
    finish(store, STEP, weights_sha256="c")
    assert store.is_mixed(figure) and store.is_mixed(tuned) and not store.is_mixed(STEP), "the start is another"
    finish(store, tuned, weights_sha256="d")
    assert not store.is_mixed(tuned) and store.is_mixed(figure)
    finish(store, figure)
    assert not store.is_mixed(figure)


def test_a_network_that_is_gone_is_no_other_one(tmp_path: Path) -> None:
    figure = Step("measure", "a figure", {}, (STEP,))
    store = Store(tmp_path, PAPER)
    finish(store, STEP, weights_sha256="a")
    finish(store, figure)
    shutil.rmtree(store.folder(STEP))
    assert not store.is_mixed(figure)


def test_what_is_not_known_of_an_older_result_is_not_held_against_it(tmp_path: Path) -> None:
    figure = Step("measure", "a figure", {}, (STEP,))
    store = Store(tmp_path, PAPER)
    finish(store, STEP)
    finish(store, figure)
    finish(store, STEP, weights_sha256="a")
    assert not store.is_mixed(figure)


def test_a_network_takes_its_place_only_when_its_step_is_finished(tmp_path: Path) -> None:
    store = Store(tmp_path, PAPER)
    store.folder(STEP).mkdir()
    for content in ("first", "second"):
        store.unfinished(STEP, MODEL).write_text(content)
        kept = store.folder(STEP) / MODEL
        assert not kept.exists() if content == "first" else kept.read_text() == "first"
        finish(store, STEP)
        assert kept.read_text() == content and not store.unfinished(STEP, MODEL).exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolkitError, match="the work folder cannot be used"):
        Store(tmp_path / "file" / "work", PAPER).begin()
    with pytest.raises(ToolkitError, match="the work folder cannot be used"):
        Store(tmp_path / "file", PAPER)


def test_a_step_is_held_by_one_run(tmp_path: Path) -> None:
    first, second = Store(tmp_path, PAPER), Store(tmp_path, PAPER)
    other = Step("train", "another training", {"seed": 1})
    with first.claim(STEP) as ours, second.claim(STEP) as theirs, second.claim(other) as another:
        assert (ours, theirs, another) == (True, False, True)
    with second.claim(STEP) as theirs:
        assert theirs, "the first is done"


def test_runs_may_begin_at_the_same_time(tmp_path: Path) -> None:
    """Processes, for a process has one writer."""
    begin = (
        "import sys; from pathlib import Path; from toolkit.reproduce.protocol import PROTOCOLS;"
        "from toolkit.reproduce.store import Store; store = Store(Path(sys.argv[1]), PROTOCOLS['paper']);"
        "print('ready', flush=True); input(); store.begin()"
    )
    how: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([sys.executable, "-c", begin, str(tmp_path / "work")], **how) for _ in range(3)]
    assert [run.stdout.readline() for run in runs if run.stdout] == ["ready\n"] * 3
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("\n")
        run.stdin.flush()
    for run in runs:
        run.communicate(timeout=60)
    assert [run.returncode for run in runs] == [0] * 3
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["reproduce.json"]


def test_nothing_is_written_before_a_run_begins(tmp_path: Path) -> None:
    store = Store(tmp_path / "work", PAPER)
    assert store.result(STEP) is None and store.missing(STEP) == [STEP] and not list(tmp_path.iterdir())
    Store(tmp_path / "work", PROTOCOLS["fast"]).begin()
    with pytest.raises(ToolkitError, match="of another protocol"):
        store.begin()


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path, PAPER)
    store.folder(STEP).mkdir()
    (store.folder(STEP) / "result.json").write_text('{"value": 1')
    with pytest.raises(ToolkitError, match="a result in the work folder is damaged") as error:
        store.result(STEP)
    assert "result.json" in error.value.found


def test_time_adds_up_over_sittings_and_lost_ones_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, PAPER)
    clock = iter([0.0, 5.0, 100.0, 107.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(energy, "joules", lambda _root: None)
    with pytest.raises(KeyboardInterrupt), store.sitting(STEP):
        raise KeyboardInterrupt
    path = store.folder(STEP) / "sittings.json"
    after_first = json.loads(path.read_text())
    assert (after_first["seconds"], after_first["count"], after_first["lost"]) == (5, 1, 0)
    path.write_text(json.dumps({**after_first, "lost": 1}))  # as a killed process leaves it
    with store.sitting(STEP) as found:
        assert json.loads(path.read_text())["lost"] == 2, "what stands if this one is killed too"
    assert (found.seconds, found.count, found.lost, found.joules) == (12, 2, 1, None)


def test_energy_adds_up_where_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, PAPER)
    readings = iter(Reading({"intel-rapl:0": value}, {"intel-rapl:0": 10_000_000}) for value in (1_000_000, 4_000_000))
    monkeypatch.setattr(energy, "joules", lambda _root: next(readings))
    with store.sitting(STEP) as found:
        pass
    assert found.joules == pytest.approx(3.0) and found == Sittings(found.seconds, found.cpu_seconds, found.joules, 1)


NAMES = {"intel-rapl:1": "package-1", "intel-rapl:2": "psys"}


def counters(root: Path, values: dict[str, int]) -> None:
    for name, value in values.items():
        kind = "core" if name.count(":") > 1 else NAMES.get(name, "package-0")
        for file, content in {"name": kind, "max_energy_range_uj": 1_000_000, "energy_uj": value}.items():
            partial = root / f"{file}.partial"
            partial.write_text(f"{content}\n")
            (root / name).mkdir(exist_ok=True)
            partial.replace(root / name / file)  # whole at any time: a meter may be reading


def test_counters_of_all_packages_are_added_and_go_round(tmp_path: Path) -> None:
    counters(tmp_path, {"intel-rapl:0": 100, "intel-rapl:1": 900_000, "intel-rapl:2": 7, "intel-rapl:0:0": 5})
    before = joules(tmp_path)
    counters(tmp_path, {"intel-rapl:0": 300, "intel-rapl:1": 50})
    after = joules(tmp_path)
    assert before is not None and after is not None and set(after.counters) == {"intel-rapl:0", "intel-rapl:1"}
    assert after.since(before) == pytest.approx((200 + 100_050) * 1e-6)


def test_a_meter_sees_counters_go_round_more_than_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that holds a joule, read whenever it has counted 0.6: three joules in all."""
    read = threading.Semaphore(0)

    def watched(root: Path) -> Reading | None:
        found = joules(root)
        read.release()
        return found

    monkeypatch.setattr(energy, "joules", watched)
    counters(tmp_path, {"intel-rapl:0": 0})
    meter = Meter(tmp_path, every=0.01)
    for number in range(1, 6):
        counters(tmp_path, {"intel-rapl:0": number * 600_000 % 1_000_000})
        while read.acquire(blocking=False):
            pass
        assert all(read.acquire(timeout=30) for _ in range(2))  # one may have been under way
    assert meter.stop() == pytest.approx(3.0)
    assert Meter(tmp_path / "nothing").stop() is None


def test_a_machine_without_counters_tells_nothing(tmp_path: Path) -> None:
    assert joules(tmp_path) is None and joules(tmp_path / "nothing") is None
    (tmp_path / "intel-rapl:0").mkdir()  # not readable, as for users without rights
    assert joules(tmp_path) is None
