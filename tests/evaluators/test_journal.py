from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from toolkit.errors import ToolkitError
from toolkit.evaluators.journal import Journal, default_folder

ARRAYS = st.dictionaries(
    st.text("abcfile.*", min_size=1, max_size=6),
    arrays_of.arrays(st.sampled_from([np.bool_, np.int64, np.float32]), arrays_of.array_shapes(max_dims=2, min_side=0)),
    max_size=3,
)


def flags(*values: int) -> dict[str, npt.NDArray[np.bool_]]:
    return {"deployed": np.array(values, bool)}


@settings(max_examples=10, deadline=None)
@given(entries=st.dictionaries(st.text(max_size=8), ARRAYS, max_size=4))
def test_what_is_put_is_got_in_the_next_run(
    entries: dict[str, dict[str, npt.NDArray[np.generic]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Names are free: `file`, an argument of numpy.savez, among them."""
    path = tmp_path_factory.mktemp("journal") / "a.sqlite"
    entries = {f"key/{key}": arrays for key, arrays in entries.items()}
    journal = Journal(path, "run")
    for key, arrays in entries.items():
        journal.put(key, arrays)
    journal.close()
    journal = Journal(path, "run", resume=True)
    for key, arrays in entries.items():
        found = journal.get(key)
        assert found is not None and found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    assert journal.get("another") is None
    journal.close()


def test_every_entry_is_on_disk_at_once(tmp_path: Path) -> None:
    """A process that is killed closes nothing: what is on the disk before that has the entry."""
    journal = Journal(tmp_path / "a.sqlite", "run")
    journal.put("key", flags(1, 0))
    shutil.copy(tmp_path / "a.sqlite", tmp_path / "b.sqlite")
    second = Journal(tmp_path / "b.sqlite", "run", resume=True)
    found = second.get("key")
    assert found is not None and found["deployed"].tolist() == [True, False]
    second.close()
    journal.close()


def test_a_later_entry_replaces_an_earlier_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.sqlite", "run")
    journal.put("key", flags(1))
    journal.put("key", flags(0))
    found = journal.get("key")
    assert found is not None and not found["deployed"][0]
    journal.close()


def test_without_resume_a_journal_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.sqlite"
    first = Journal(path, "run")
    first.put("key", flags(1))
    first.close()
    second = Journal(path, "other settings")
    assert second.get("key") is None
    second.close()
    assert path.exists()


def test_a_finished_run_leaves_no_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "a.sqlite", "run")
    journal.put("key", flags(1))
    journal.close(discard=True)
    assert not list(tmp_path.iterdir())
    assert journal.get("key") is None
    journal.put("key", flags(1))
    assert journal.get("key") is None, "closed: nothing is kept"


def test_without_a_path_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Journal()
    journal.put("key", flags(1))
    assert journal.get("key") is None
    journal.close(discard=True)
    assert not list(tmp_path.iterdir())


def test_resuming_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "a.sqlite", "eps 0.1").close()
    with pytest.raises(ToolkitError, match="cannot be continued") as raised:
        Journal(tmp_path / "a.sqlite", "eps 0.2", resume=True)
    assert "other settings" in raised.value.found and "--resume" in raised.value.fix


@pytest.mark.parametrize("content", [b"no database, by no means" * 40, b"SQLite format 3\0" + b"x" * 2000])
def test_resuming_what_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.sqlite").write_bytes(content)
    with pytest.raises(ToolkitError, match="cannot be continued"):
        Journal(tmp_path / "a.sqlite", "run", resume=True)
    Journal(tmp_path / "a.sqlite", "run").close()


@pytest.mark.parametrize("content", [None, b"no database, by no means" * 40, b"SQLite format 3\0" + b"x" * 2000])
def test_what_cannot_be_continued_may_be_given_up(
    tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.sqlite"
    earlier = Journal(path, "another run")
    earlier.put("key", flags(1))
    earlier.close()
    if content is not None:
        path.write_bytes(content)
    journal = Journal(path, "run", resume="or anew")
    assert journal.get("key") is None
    assert "cannot be continued, and begins anew" in capsys.readouterr().err
    journal.put("key", flags(0))
    journal.close()
    again = Journal(path, "run", resume="or anew")
    found = again.get("key")
    assert found is not None and not found["deployed"][0]
    again.close()


def test_a_journal_that_cannot_be_made_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    journal = Journal(tmp_path / "file" / "a.sqlite", "run")
    journal.put("key", flags(1))
    journal.put("key", flags(1))
    assert journal.get("key") is None
    assert capsys.readouterr().err.count("cannot be resumed") == 1


@pytest.mark.parametrize("reading", [True, False])
def test_a_journal_that_is_lost_on_the_way_costs_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reading: bool
) -> None:
    path = tmp_path / "a.sqlite"
    journal = Journal(path, "run")
    journal.put("kept", flags(1))
    other = sqlite3.connect(path)
    other.execute("DROP TABLE entry")
    other.commit()
    other.close()
    if reading:
        assert journal.get("kept") is None
    journal.put("key", flags(1))
    journal.put("key", flags(1))
    assert journal.get("key") is None
    assert capsys.readouterr().err.count("warning: the evaluation cannot be resumed") == 1
    journal.close()


def test_journals_lie_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "toolkit" / "attacks"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "toolkit" / "attacks"


def test_two_equal_runs_at_a_time_do_not_take_each_others_file(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    first = Journal(path, "run")
    first.put("key", flags(1))
    for resume in (False, True):
        with pytest.raises(ToolkitError, match="under way in another process") as caught:
            Journal(path, "run", resume=resume)
        assert "--resume" in caught.value.fix
    first.close()
    again = Journal(path, "run", resume=True)
    assert again.get("key") is not None
    again.close(discard=True)
    assert not list(tmp_path.iterdir())
