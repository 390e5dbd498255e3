from __future__ import annotations

import datetime
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.search import fakes
from tests.search.fakes import VALUES, FakeWork, a_space, a_study, ask, noted, plan, tell
from toolkit import locks
from toolkit.errors import ToolkitError
from toolkit.search import database, ownership, sampler, storage
from toolkit.search.database import quiet
from toolkit.search.executors import InProcess
from toolkit.search.objective import Job
from toolkit.search.runner import points_of, run_trials
from toolkit.search.storage import Study


def test_the_first_trial_is_what_the_user_gave(url: str) -> None:
    study = a_study(url)
    assert ask(study).parameters == {"prune.ratio": 0.5, "precision": "int8"}
    study.close()


def test_no_configuration_is_tried_twice_and_a_small_space_ends(url: str) -> None:
    study = a_study(url, a_space("prune.ratio=0.2:0.8:0.2; precision=int8"))
    found = []
    while (ticket := study.ask(99)) is not None:
        found.append(ticket.parameters["prune.ratio"])
        tell(study, ticket)
    assert sorted(round(float(ratio), 3) for ratio in found) == [0.2, 0.4, 0.6, 0.8]
    study.close()


def test_proposals_are_those_of_the_seed_alone(tmp_path: Path) -> None:
    def proposals(name: str, seed: int, count: int = 10, pause: int | None = None) -> list[Any]:
        study = a_study(f"sqlite:///{tmp_path / name}", seed=seed)
        found = []
        for number in range(count):
            if number == pause:  # as a process that ends and another that goes on
                study.close()
                study = a_study(f"sqlite:///{tmp_path / name}", seed=seed)
            ticket = ask(study)
            found.append(ticket.parameters)
            tell(study, ticket)
        study.close()
        return found

    one = proposals("one", 3)
    assert len(one) > sampler.STARTUP_TRIALS and one == proposals("paused", 3, pause=6)
    assert one[:3] != proposals("other", 4, count=3)


def test_a_trial_of_a_process_that_died_is_asked_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = a_study(url)
    ask_again = ask(gone)
    second = a_study(url)
    assert ask(second).parameters != ask_again.parameters, "its process lives"
    monkeypatch.setattr(storage, "vanished", lambda _: True)
    again = ask(second)
    assert again.parameters == ask_again.parameters and again.number != ask_again.number
    monkeypatch.undo()
    assert tell(second, again)
    assert not tell(gone, ask_again), "what was thought dead speaks, and is not counted"
    assert len(second.tried()) == 1
    gone.close()
    second.close()


def test_a_heart_that_stopped_elsewhere_is_noticed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "GRACE_S", 1)
    monkeypatch.setattr(storage, "vanished", lambda _: False)  # on another machine that cannot be seen
    silent = a_study(url)
    lost = ask(silent)
    silent._stop.set()
    time.sleep(2.1)  # real time: the data base compares its own clock with the last heartbeat
    other = a_study(url)
    assert ask(other).parameters == lost.parameters
    silent._held.clear()
    silent.close()
    other.close()


def test_a_trial_that_kills_every_process_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = a_study(url)
    deadly = ask(study).parameters
    monkeypatch.setattr(storage, "vanished", lambda _: True)
    for _ in range(storage.ATTEMPTS - 1):
        study._held.clear()
        assert ask(study).parameters == deadly
    study._held.clear()
    assert ask(study).parameters != deadly
    (given_up,) = study.tried()
    assert given_up.parameters == deadly and given_up.reason == storage.DIED and given_up.result is None
    study._held.clear()
    study.close()


def test_what_is_given_back_is_asked_again_however_often(url: str) -> None:
    study = a_study(url)
    first = ask(study)
    for _ in range(storage.ATTEMPTS + 1):
        study.release(first.number)
        again = ask(study)
        assert again.parameters == first.parameters
        first = again
    study.close()


def test_a_trial_that_died_while_it_was_drawn_is_dropped(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = a_study(url)
    with quiet():
        study._study.ask()  # no owner, no settings
    assert study.ask(1) is None, "it may be somebody's who is about to say so"
    monkeypatch.setattr(storage, "GRACE_S", 0)
    assert study.ask(1) is not None
    study.close()


def test_impossible_trials_count_and_say_why(url: str) -> None:
    study = a_study(url)
    first = ask(study)
    assert study.refuse(first, "no filters left")
    assert study.ask(1) is None
    (found,) = study.tried()
    assert (found.number, found.reason, found.result) == (first.number, "no filters left", None)
    study.close()


@pytest.mark.parametrize("change", ["weights", "more"])
def test_another_study_in_the_storage_is_refused(url: str, change: str) -> None:
    a_study(url).close()
    with pytest.raises(ToolkitError, match="the storage holds another study") as caught:
        a_study(url, identity={change: "other"})
    assert change in caught.value.found and "--study" in caught.value.fix
    a_study(url, name="beside it", identity={change: "other"}).close()
    with pytest.raises(ToolkitError, match="--force does not remove another study"):
        storage.forget(url, "search", {"weights": "other"})
    storage.forget(url, "search", {"weights": "abc"})
    storage.forget(url, "never there", {"weights": "other"})
    a_study(url, identity={change: "other"}).close()


def test_only_searches_of_the_same_network_are_begun_anew_by_force(url: str) -> None:
    a_study(url, identity={"weights": "a", "epochs": 1}).close()
    for identity, anew in (({"weights": "a", "epochs": 2}, True), ({"weights": "b", "epochs": 1}, False)):
        with pytest.raises(ToolkitError, match="the storage holds another study") as caught:
            a_study(url, identity=identity)
        assert ("--force" in caught.value.fix) is anew


def test_a_storage_that_is_opened_by_many_at_once_is_made_once(tmp_path: Path) -> None:
    for number in range(5):
        url, barrier, opened = f"sqlite:///{tmp_path / str(number)}", threading.Barrier(3), list[str]()

        def begin(url: str = url, barrier: threading.Barrier = barrier, opened: list[str] = opened) -> None:
            barrier.wait()
            study = a_study(url)
            opened.append(url)
            study.close()

        threads = [threading.Thread(target=begin) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(opened) == 3, "the others failed"


def test_a_result_outlives_a_storage_that_fails_for_a_while(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study, failures = a_study(url), iter(range(2))
    ticket, finish = ask(study), study._finish

    def failing(number: int, values: list[float] | None) -> bool:
        if next(failures, None) is not None:
            raise optuna.exceptions.StorageInternalError("restarting")
        return finish(number, values)

    monkeypatch.setattr(study, "_finish", failing)
    assert tell(study, ticket) and len(study.tried()) == 1
    monkeypatch.setattr(storage, "GRACE_S", 0.0)
    failures, ticket = iter(range(9)), ask(study)
    with pytest.raises(ToolkitError, match="the storage failed during the search"), database.failures(url):
        tell(study, ticket)
    study.close()


def test_a_study_of_other_software_is_refused(url: str) -> None:
    foreign = optuna.create_study(storage=url, study_name="search", directions=list(storage.DIRECTIONS.values()))
    foreign.tell(foreign.ask(), [1.0] * 4)
    with pytest.raises(ToolkitError, match="the storage holds another study"):
        a_study(url)


def test_a_study_with_other_objectives_is_refused(url: str) -> None:
    optuna.create_study(storage=url, study_name="search")
    with pytest.raises(ToolkitError, match="the storage holds another study"):
        a_study(url)


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ("sqlite:////no/such/folder/study.sqlite", "unable to open"),
        ("nonsense", "nonsense"),
        ("nosuchdialect://user:secret@host/base", "nosuchdialect"),
    ],
)
def test_a_storage_that_cannot_be_used_is_named_without_its_password(bad: str, found: str) -> None:
    with pytest.raises(ToolkitError, match="the storage cannot be used") as caught:
        a_study(bad)
    assert found in caught.value.found and "secret" not in caught.value.found


def test_processes_on_one_storage_share_the_trials_and_one_may_be_killed(url: str, tmp_path: Path) -> None:
    log, trials = tmp_path / "log", 10
    command = [sys.executable, "-m", "tests.search.fakes", url, str(log), str(trials), "0.3"]
    first, second = (subprocess.Popen(command) for _ in range(2))
    deadline = time.monotonic() + 120
    while not {first.pid, second.pid} <= {process for _, _, process in noted(log, "begin")}:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.kill()
    first.wait()
    assert second.wait(120) == 0
    study = a_study(url)
    tried = study.tried()
    study.close()
    assert len(tried) == trials and all(one.result is not None for one in tried)
    assert len({tuple(one.parameters.values()) for one in tried}) == trials
    ended = [trial for trial, _, _ in noted(log, "end")]
    assert len(ended) == len(set(ended)) and set(ended) >= {one.number for one in tried}
    assert 1 <= sum(process == second.pid for _, _, process in noted(log, "end")) <= trials


def test_seeds_are_averaged_and_the_rest_of_a_search_goes_on(url: str, tmp_path: Path) -> None:
    space, log = a_space(), tmp_path / "log"
    study = a_study(url, space)
    run_trials(study, space, InProcess(FakeWork(str(log), fails_at=1)), plan(4, seeds=(7, 9)))
    begun = [(trial, seed) for trial, seed, _ in noted(log, "begin")]
    tried = study.tried()
    assert begun == [(one.number, seed) for one in tried for seed in (7, 9)]
    assert [one.reason for one in tried] == [None, "it failed: a reason", None, None]
    assert [len(one.result) for one in tried if one.result] == [2, 2, 2]
    found = points_of(tried)
    assert [point.clean.total for point in found] == [1000] * 3
    run_trials(study, space, InProcess(FakeWork(str(log))), plan(4, seeds=(7, 9)))
    assert len(noted(log, "begin")) == 8, "nothing is left to do"
    study.close()


def test_a_problem_of_all_trials_ends_the_search(url: str, tmp_path: Path) -> None:
    study, space = a_study(url), a_space()
    work = FakeWork(str(tmp_path / "log"), fails_at=1, fatal=True)
    with pytest.raises(ToolkitError, match="it failed"):
        run_trials(study, space, InProcess(work), plan(4))
    study.close()
    study = a_study(url)
    run_trials(study, space, InProcess(FakeWork(str(tmp_path / "log"))), plan(4))
    assert len(study.tried()) == 4
    study.close()


def test_no_trial_begins_after_the_time_is_spent(url: str, tmp_path: Path) -> None:
    study, space = a_study(url), a_space()
    run_trials(study, space, InProcess(FakeWork(str(tmp_path / "log"), 0.05)), plan(99, seconds=0.3))
    assert 1 <= len(study.tried()) < 20
    study.close()


def test_what_was_given_back_is_waited_for_only_while_it_is_wanted(url: str) -> None:
    study = a_study(url)
    first, second = (study.ask(3) for _ in range(2))
    assert first is not None and second is not None
    job = Job(first.number, study._space.config(first.parameters))
    study.tell(first, dict.fromkeys(storage.DIRECTIONS, 1.0), [fakes.measured(job).record()])
    study.release(second.number)
    assert study.others(3) == 1, "somebody will make it"
    assert study.ask(1) is None and study.others(1) == 0, "one was wanted, and is made: nobody will"
    study.close()


def test_a_process_waits_for_the_others(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, space = a_study(url), a_space()
    ticket = ask(other)
    monkeypatch.setattr("toolkit.search.runner.time.sleep", lambda _: tell(other, ticket))
    study = a_study(url)
    run_trials(study, space, InProcess(FakeWork(str(tmp_path / "log"))), plan(1))
    assert len(study.tried()) == 1 and not noted(tmp_path / "log", "begin")
    other.close()
    study.close()


def test_a_process_knows_itself_and_not_its_namesake() -> None:
    me = ownership.this_process()
    assert not ownership.vanished(me)
    assert ownership.vanished({**me, "since": me["since"] - 60}), "another process with the same number"
    assert not ownership.vanished({**me, "since": me["since"] + 1}), "the clock was set"
    assert ownership.vanished({**me, "pid": 2**22 + 1})
    assert not ownership.vanished({**me, "machine": "another", "pid": 2**22 + 1})


@pytest.mark.parametrize("hours", [-9, 9])
def test_a_trial_without_an_owner_is_dead_after_a_while_whatever_its_machines_clock(
    url: str, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    study, now = a_study(url), 1000.0
    monkeypatch.setattr("toolkit.search.storage.time.monotonic", lambda: now)
    trial = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
    trial.datetime_start = datetime.datetime.now() + datetime.timedelta(hours=hours)
    assert not study._is_dead(trial)
    now += storage.GRACE_S - 1
    assert not study._is_dead(trial)
    now += 2
    assert study._is_dead(trial)
    study.close()


def test_a_process_that_dies_between_two_writes_has_a_heart_that_stopped(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = a_study(url)

    def killed(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patched:
        patched.setattr(optuna.Trial, "set_user_attr", killed)
        with pytest.raises(SystemExit):
            study.ask(1)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        assert connection.execute("select count(*) from trial_heartbeats").fetchone() == (1,)
    study.close()


def test_closing_gives_back_the_others_where_one_was_ended_by_another_process(url: str) -> None:
    study = a_study(url)
    first, second = ask(study, 3), ask(study, 3)
    optuna.load_study(study_name="search", storage=url).tell(first.number, state=optuna.trial.TrialState.FAIL)
    study.close()
    again = a_study(url)
    assert again.ask(3) is not None
    assert again._trial(second.number).state == optuna.trial.TrialState.FAIL, "given back"
    again.close()


def test_two_points_that_are_asked_at_the_same_moment_are_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a trial's making and the writing of its digest its parameters tell what it tries."""
    study, other = a_study(url), a_study(url)
    with monkeypatch.context() as patched:
        patched.setattr(optuna.Trial, "set_user_attr", lambda *_: None)
        first = ask(study, 99)
    other._study.enqueue_trial(dict(first.parameters))
    assert ask(other, 99).parameters != first.parameters
    study.close()
    other.close()


@pytest.mark.parametrize("limit", [0.3, 0.95])
def test_proposals_follow_the_limits_as_they_are_now(url: str, limit: float) -> None:
    """A search that goes on under others is not steered by those of before."""

    def excess(result: Any) -> dict[str, float]:
        return {"--min-robust": limit - result[0]["robust"]["correct"] / result[0]["robust"]["total"]}

    study = Study(url, "search", a_space(), {"weights": "abc"}, 0, lambda _: {"--min-robust": 1.0})
    tell(study, ask(study))
    study.close()
    study = Study(url, "search", a_space(), {"weights": "abc"}, 0, excess)
    found = sampler._judged(study._study, study._excess_of).get_trials(deepcopy=False)
    wanted = [trial.constraints for trial in found if trial.state == optuna.trial.TrialState.COMPLETE]
    (stored,) = study.tried()
    assert stored.result is not None and wanted == [excess(stored.result)]
    assert not any(trial.constraints for trial in study._study.trials), "nothing of it is kept"
    study.close()


def test_constraints_decide_which_trials_are_followed(tmp_path: Path) -> None:
    """The same results under other limits lead to other proposals."""

    def proposals(name: str, sign: float) -> list[Any]:
        def excess(result: Any) -> dict[str, float]:
            return {"--max-size": sign * (result[0]["bytes"] - 3.5)}

        study = Study(f"sqlite:///{tmp_path / name}", "search", a_space(), {"weights": "abc"}, 0, excess)
        found = []
        for _ in range(16):
            ticket = ask(study)
            found.append(ticket.parameters)
            job = Job(ticket.number, study._space.config(ticket.parameters))
            size = round(10 * float(ticket.parameters["prune.ratio"]))
            record = {**fakes.measured(job).record(), "bytes": size}
            study.tell(ticket, VALUES | {"bytes": 1.0}, [record])
        study.close()
        return found

    small, large = proposals("small", 1.0), proposals("large", -1.0)
    start = sampler.STARTUP_TRIALS
    assert small[:start] == large[:start] and small[start:] != large[start:]


def junk(study: Study) -> int:
    return sum(storage.SKIPPED in trial.user_attrs for trial in study._trials())


def test_a_process_that_waits_in_a_spent_space_asks_nothing(url: str) -> None:
    space = a_space("prune.ratio=0.2:0.8:0.2; precision=int8")
    other, study = a_study(url, space), a_study(url, space)
    held = [ask(other) for _ in range(4)]
    assert study.ask(99) is None
    asked = junk(study)
    for _ in range(3):
        assert study.ask(99) is None
    assert junk(study) == asked
    other.release(held[2].number)
    assert ask(study).parameters == held[2].parameters, "something is left again"
    for one in (other, study):
        one.close()


def test_a_point_that_waits_twice_holds_nobody_up(url: str) -> None:
    space = a_space("prune.ratio=0.2:0.8:0.2; precision=int8")
    study = a_study(url, space)
    tickets = [ask(study) for _ in range(4)]
    assert study.ask(99) is None
    study._study.enqueue_trial(dict(tickets[0].parameters))
    asked = junk(study)
    assert study.ask(99) is None and study.others(99) == 0
    assert junk(study) == asked + 1
    study.close()


def test_who_asks_a_file_of_sqlite_asks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    study, asked = a_study("sqlite:///study.sqlite"), []
    elsewhere = f"sqlite:///{tmp_path}/folder/../study.sqlite"
    assert database.storage_lock("sqlite:///study.sqlite") == database.storage_lock(elsewhere)
    assert database.storage_lock("sqlite:///other.sqlite") != database.storage_lock(elsewhere)
    original = study._study.ask

    def noted(*parts: Any) -> optuna.Trial:
        with pytest.raises(BlockingIOError):
            locks.take(database.storage_lock(elsewhere))
        asked.append(parts)
        return original(*parts)

    monkeypatch.setattr(study._study, "ask", noted)
    assert ask(study) and asked
    study.close()


def test_a_trial_that_two_were_given_is_made_by_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever signs last has it, and whoever reads another's name lets go of it."""
    study, sign, overtaken = a_study(url), optuna.Trial.set_user_attr, list[int]()

    def overtaking(trial: optuna.Trial, key: str, value: Any) -> None:
        sign(trial, key, value)
        if key == storage.OWNER and not overtaken:
            overtaken.append(trial.number)
            sign(trial, key, {**value, "study": "another"})

    monkeypatch.setattr(optuna.Trial, "set_user_attr", overtaking)
    ticket = ask(study)
    assert overtaken == [0] and ticket.number == 1 and list(study._held) == [1]
    assert study._trial(0).state == optuna.trial.TrialState.RUNNING, "the other makes it"
    study.close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@there/base", "postgresql://me:***@there/base"),
        ("postgresql://there/base?user=me&password=secret", "postgresql://there/base?password=***&user=me"),
        ("mysql://there/base?passwd=secret&charset=utf8", "mysql://there/base?charset=utf8&passwd=***"),
        ("mssql://?odbc_connect=SERVER%3Dthere%3BPWD%3Dsecret", "mssql://?odbc_connect=***"),
        ("sqlite:///folder/study.sqlite", "sqlite:///folder/study.sqlite"),
        ("no url?password=secret", "no url"),
        ("postgresql://me:secret@there:port/base", "there:port/base"),
    ],
)
def test_no_password_is_shown_wherever_it_stands(url: str, shown: str) -> None:
    found = database.without_password(url)
    assert "secret" not in found
    assert sorted(found.replace("?", "&").split("&")) == sorted(shown.replace("?", "&").split("&"))
