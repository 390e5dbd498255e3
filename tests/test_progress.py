from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from toolkit import progress


@pytest.fixture(autouse=True)
def audible() -> Iterator[None]:
    progress.set_quiet(False)
    yield
    progress.set_quiet(False)


def test_plain_lines_where_stderr_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    with progress.task("counting", 3) as bar:
        bar.advance(0)
        bar.advance(1, "loss 0.5")
        bar.advance(2)
    captured = capsys.readouterr()
    first, second, last = captured.err.splitlines()
    assert captured.out == ""
    assert first.startswith("counting: 1/3, ") and first.endswith("s left loss 0.5")
    assert second.startswith("counting: 3/3, 0 s left")
    assert last.startswith("counting: done in ")


def test_plain_lines_are_rare(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.task("counting", 1000) as bar:
        for _ in range(1000):
            bar.advance()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_quiet_silences_tasks_and_notices(capsys: pytest.CaptureFixture[str]) -> None:
    progress.set_quiet(True)
    with progress.task("counting", 2) as bar:
        bar.advance(2)
    progress.notice("hello")
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.task("counting", 2) as bar:
        bar.advance(2, "loss 0.5")
    captured = capsys.readouterr()
    assert "counting" in captured.err and "2/2" in captured.err and "loss 0.5" in captured.err
    assert captured.out == ""


def test_an_interrupted_task_does_not_say_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), progress.task("counting", 2):
        raise KeyboardInterrupt
    assert "done" not in capsys.readouterr().err
