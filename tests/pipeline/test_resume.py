from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.tiny import World, repeatable, report_of
from toolkit import cli
from toolkit.evaluators import worst_case
from toolkit.training.run import Run


class Interrupt:
    """Raises KeyboardInterrupt at the given optimiser step, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        self.left = step
        original = Run.advance

        def advance(run: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            original(run)

        monkeypatch.setattr(Run, "advance", advance)


def test_a_resumed_run_equals_an_uninterrupted_one(
    hardened: World, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*tiny.harden_arguments("again", attacks="fast"), "--threads", "1", "-q"]
    Interrupt(monkeypatch, step=6)
    assert tiny.run(*command) == cli.INTERRUPTED
    assert f"continue with: toolkit {' '.join(command)} --resume" in capsys.readouterr().err
    assert not Path("again").exists()
    assert tiny.entries(here / ".again.partial") == ["training.pt"]
    assert tiny.run(*command, "--resume") == cli.DONE
    assert repeatable(report_of(Path("again"))) == repeatable(report_of(hardened.bundle))
    assert (here / "again/model.onnx").read_bytes() == (hardened.bundle / "model.onnx").read_bytes()
    assert ".again.partial" not in tiny.entries(here)


def test_an_evaluation_that_was_interrupted_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*tiny.harden_arguments("again", epochs=0, attacks="apgd-ce,square"), "--threads", "1", "-q"]
    real, made = worst_case._attack, []

    def interrupted(attempt: Any, *rest: Any) -> Any:
        if attempt.how.by_queries:
            raise KeyboardInterrupt
        made.append(str(attempt))
        return real(attempt, *rest)

    def only_what_is_left(attempt: Any, *rest: Any) -> Any:
        assert str(attempt) not in made, "made twice"
        return real(attempt, *rest)

    monkeypatch.setattr(worst_case, "_attack", interrupted)
    assert tiny.run(*command) == cli.INTERRUPTED
    assert f"continue with: toolkit {' '.join(command)} --resume" in capsys.readouterr().err
    assert tiny.entries(here / ".again.partial") == ["journals"] and made
    assert tiny.run(*command) == cli.BAD_INPUT, "a mistyped command must not cost an evaluation"
    monkeypatch.setattr(worst_case, "_attack", only_what_is_left)
    assert tiny.run(*command, "--resume") == cli.DONE
    passes = report_of(Path("again"))["worst_case"]["passes"]
    kinds = [row["attack"] for row in passes]
    assert set(kinds) == {"apgd-ce", "square"} and kinds == sorted(kinds)
    assert [row["graphs"] for row in passes if row["attack"] == "square"] == [["deployed"], ["fp32"]]
    assert ".again.partial" not in tiny.entries(here)


def test_a_resume_with_other_threads_or_settings(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = tiny.harden_arguments("again")
    Interrupt(monkeypatch, step=6)
    assert tiny.run(*command, "--threads", "1") == cli.INTERRUPTED
    assert tiny.run(*command, "--threads", "1", "--seed", "5", "--resume") == cli.BAD_INPUT
    assert "had other settings" in capsys.readouterr().err
    assert tiny.entries(here / ".again.partial") == ["training.pt"], "the interrupted run is still there"
    assert tiny.run(*command, "--threads", "2", "--resume") == cli.DONE
    err = capsys.readouterr().err
    assert "began with 1 thread(s) and goes on with 2" in err and "--threads 1 avoids that" in err


def test_an_interrupt_before_anything_can_be_resumed_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny.entries(here)
    Interrupt(monkeypatch, step=1)
    assert tiny.run(*tiny.harden_arguments("deep/again"), "-q") == cli.INTERRUPTED
    assert "start again with the same command" in capsys.readouterr().err
    assert [name for name in tiny.entries(here) if name != "__pycache__"] == before
