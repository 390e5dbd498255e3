from __future__ import annotations

import json
from pathlib import Path

import pytest

from toolkit.errors import ToolkitError
from toolkit.reproduce import store as module
from toolkit.reproduce.energy import Reading, joules
from toolkit.reproduce.protocol import PROTOCOLS
from toolkit.reproduce.steps import Step
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
    Store(tmp_path, PROTOCOLS["fast"])
    with pytest.raises(ToolkitError, match="the work folder is of another protocol") as error:
        Store(tmp_path, PAPER)
    assert "filled under the protocol fast, and this run is under paper" in error.value.found
    assert "--work DIR" in error.value.fix


def test_other_settings_of_one_protocol_are_another(tmp_path: Path) -> None:
    Store(tmp_path, PAPER)
    marker = json.loads((tmp_path / "reproduce.json").read_text())
    (tmp_path / "reproduce.json").write_text(json.dumps({**marker, "settings": "of an older version"}))
    with pytest.raises(ToolkitError, match="of another protocol") as error:
        Store(tmp_path, PAPER)
    assert "other settings of it" in error.value.found


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolkitError, match="the work folder cannot be used"):
        Store(tmp_path / "file" / "work", PAPER)


def test_two_runs_do_not_fill_one_folder(tmp_path: Path) -> None:
    first, second = Store(tmp_path, PAPER), Store(tmp_path, PAPER)
    with (
        first.locked(),
        pytest.raises(ToolkitError, match="another run is filling this work folder") as error,
        second.locked(),
    ):
        pass
    assert error.value.found == str(tmp_path) and "--max-runs 0" in error.value.fix
    with second.locked():  # the first is done
        pass


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
    monkeypatch.setattr(module, "joules", lambda: None)
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
    monkeypatch.setattr(module, "joules", lambda: next(readings))
    with store.sitting(STEP) as found:
        pass
    assert found.joules == pytest.approx(3.0) and found == Sittings(found.seconds, found.cpu_seconds, found.joules, 1)


def counters(root: Path, values: dict[str, int]) -> None:
    for name, value in values.items():
        (root / name).mkdir(exist_ok=True)
        (root / name / "energy_uj").write_text(f"{value}\n")
        (root / name / "max_energy_range_uj").write_text("1000000\n")


def test_counters_of_all_packages_are_added_and_go_round(tmp_path: Path) -> None:
    counters(tmp_path, {"intel-rapl:0": 100, "intel-rapl:1": 900_000, "intel-rapl:0:0": 5})
    before = joules(tmp_path)
    counters(tmp_path, {"intel-rapl:0": 300, "intel-rapl:1": 50})
    after = joules(tmp_path)
    assert before is not None and after is not None and set(after.counters) == {"intel-rapl:0", "intel-rapl:1"}
    assert after.since(before) == pytest.approx((200 + 100_050) * 1e-6)


def test_a_machine_without_counters_tells_nothing(tmp_path: Path) -> None:
    assert joules(tmp_path) is None and joules(tmp_path / "nothing") is None
    (tmp_path / "intel-rapl:0").mkdir()  # not readable, as for users without rights
    assert joules(tmp_path) is None
