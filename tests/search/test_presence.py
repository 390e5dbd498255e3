from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit.errors import ToolkitError
from toolkit.search.presence import at_work


def noting(log: list[str]) -> Callable[[], None]:
    return lambda: log.append("emptied")


def test_searches_share_a_folder_and_none_is_begun_anew_under_another(tmp_path: Path) -> None:
    folder, done = tmp_path / "out", list[str]()
    with at_work(folder), at_work(folder):
        (folder / "study.sqlite").touch()
        with pytest.raises(ToolkitError, match="a search that is under way") as caught, at_work(folder, noting(done)):
            pytest.fail("it began")
        assert str(folder) in caught.value.found and done == [] and (folder / "study.sqlite").is_file()
    with at_work(folder, noting(done)):
        assert done == ["emptied"]
        with at_work(folder):  # once it is emptied, others may come
            pass
    with pytest.raises(ToolkitError), at_work(folder), at_work(folder, noting(done)):
        pytest.fail("it began")


def fail(folder: Path, *, leaving: str | None = None) -> None:
    with at_work(folder):
        if leaving:
            (folder / leaving).touch()
        raise ValueError("refused")


def test_an_error_leaves_no_empty_folder(tmp_path: Path) -> None:
    for name, leaving in (("empty", None), ("full", "file")):
        with pytest.raises(ValueError, match="refused"):
            fail(tmp_path / name, leaving=leaving)
        assert (tmp_path / name).exists() is (leaving is not None)
