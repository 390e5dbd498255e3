"""Studies that are removed, or begun anew, while others search."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.search.fakes import a_study, ask, tell
from toolkit.errors import ToolkitError
from toolkit.search import database, storage


def test_a_file_lies_where_its_name_says(tmp_path: Path) -> None:
    for name in ("a?b", "a?c", "50% #1", "ä"):
        path = tmp_path / name / "study.sqlite"
        path.parent.mkdir()
        a_study(database.file_url(path)).close()
        assert path.is_file()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_search_that_is_under_way_is_not_removed(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = a_study(url)
    ticket = ask(study)
    with pytest.raises(ToolkitError, match="a search that is under way"):
        storage.forget(url, "search", {"weights": "abc"})
    assert tell(study, ticket)
    ask(study)
    monkeypatch.setattr(storage, "vanished", lambda _owner: True)
    storage.forget(url, "search", {"weights": "abc"})
    with pytest.raises(ToolkitError, match="begun anew"):
        study.ask(99)
    study.close()


def test_what_a_search_holds_is_lost_with_its_study(url: str) -> None:
    """SQLite gives the keys of what was removed again."""
    study = a_study(url)
    held, second = ask(study), ask(study)
    optuna.delete_study(study_name="search", storage=url)
    other = a_study(url, identity={"epochs": 3})
    theirs = ask(other)
    assert theirs.number == held.number
    assert not tell(study, held) and not study.refuse(second, "a reason")
    assert tell(other, theirs) and [one.number for one in other.tried()] == [theirs.number]
    with pytest.raises(ToolkitError, match="begun anew"):
        study.ask(99)
    study.close()
    other.close()


def test_a_trial_that_another_process_ends_at_this_moment_does_not_count(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = a_study(url)
    tickets = ask(study), ask(study)

    def late(trial: optuna.Trial, name: str, value: Any) -> None:
        study._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.FAIL)
        set_user_attr(trial, name, value)

    set_user_attr = optuna.Trial.set_user_attr
    monkeypatch.setattr(optuna.Trial, "set_user_attr", late)
    assert not tell(study, tickets[0]) and not study.refuse(tickets[1], "a reason")
    study.close()


def test_a_search_that_stood_still_does_not_take_its_own_trial_for_dead(url: str) -> None:
    study = a_study(url)
    ticket = ask(study)
    study._stop.set()  # its heart stands still
    study._heart.join()
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as base, base:
        base.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-120 seconds')")
    assert ask(study).parameters != ticket.parameters
    assert tell(study, ticket)
    study.close()
