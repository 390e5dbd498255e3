from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.search import fakes
from tests.search.fakes import a_space, a_study, plan
from toolkit import progress
from toolkit.config import HardenConfig
from toolkit.errors import ToolkitError
from toolkit.search.executors import InProcess
from toolkit.search.objective import Job, Measurement, Workbench
from toolkit.search.problems import problem_of
from toolkit.search.runner import run_trials


@dataclass
class Broken:
    """A laboratory that fails on the first configuration it gets, whenever it gets it."""

    error: BaseException
    first: HardenConfig | None = None

    def measure(self, config: HardenConfig) -> Measurement:
        self.first = self.first or config
        if config == self.first:
            raise self.error
        return fakes.measured(Job(0, config))


def workbench(folder: Path, laboratory: Broken, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    monkeypatch.setattr(Workbench, "laboratory", lambda *_: laboratory)
    return Workbench(str(folder), str(folder), 10, "pgd")


def test_a_defect_of_one_trial_is_noticed_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    progress.set_quiet(True)
    space, url, traces = a_space(), f"sqlite:///{tmp_path / 'study.sqlite'}", tmp_path / "defects"
    laboratory = Broken(RuntimeError("out of memory\nand more of it"))
    wanted = plan(3, traces=traces)
    for _ in range(2):  # and the same command again does not meet it
        study = a_study(url, space)
        run_trials(study, space, InProcess(workbench(tmp_path, laboratory, monkeypatch)), wanted)
        tried = study.tried()
        study.close()
    assert [one.reason for one in tried] == ["a defect: RuntimeError: out of memory", None, None]
    said = capsys.readouterr().err
    assert said.count("trial 0 cannot be made: a defect: RuntimeError: out of memory") == 1
    (file,) = traces.iterdir()
    assert str(file) in said and "in measure" in file.read_text()


def test_defects_in_a_row_end_the_search_before_all_trials_are_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AllBroken(Broken):
        def measure(self, config: HardenConfig) -> Measurement:
            made.append(config)
            if len(made) == 3:  # one that is made between them
                return fakes.measured(Job(0, config))
            raise self.error

    made: list[HardenConfig] = []
    space = a_space()
    study = a_study(f"sqlite:///{tmp_path / 'study.sqlite'}", space)
    bench = workbench(tmp_path, AllBroken(RuntimeError("CUDA error: an illegal memory access")), monkeypatch)
    with pytest.raises(ToolkitError, match="3 trials in a row met a defect") as error:
        run_trials(study, space, InProcess(bench), plan(20, traces=tmp_path / "defects"))
    assert "illegal memory access" in error.value.found and "the same command goes on" in error.value.fix
    assert len(made) == 6 and len([one for one in study.tried() if one.reason]) == 5
    study.close()


@pytest.mark.parametrize(
    ("error", "fatal", "said"),
    [
        (MemoryError(), False, "a defect: MemoryError"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), False, "a defect: OSError"),
        (ToolkitError("it diverges", found="nan", fix="tune less"), False, "it diverges: nan"),
        (OSError(errno.ENOSPC, "No space left on device"), True, "the disk is full: "),
        (OSError(errno.EMFILE, "Too many open files"), True, "the system refuses what a trial needs: OSError"),
    ],
)
def test_what_one_trial_meets_and_what_all_would(
    error: Exception, fatal: bool, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = workbench(tmp_path, Broken(error), monkeypatch)(Job(0, a_space().config(a_space().start())))
    assert outcome.problem is not None and outcome.problem.fatal is fatal
    assert outcome.problem.reason.startswith(said)
    assert (outcome.problem.trace is not None) == said.startswith("a defect")


def test_a_full_disk_that_harden_told_of_is_one(tmp_path: Path) -> None:
    told = ToolkitError("the disk is full", found="", fix="")
    told.__cause__ = RuntimeError("[enforce fail at inline_container.cc:664] unexpected pos")
    assert problem_of(told, tmp_path).fatal


def test_an_interrupt_is_no_problem_and_gives_the_trial_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, url = a_space(), f"sqlite:///{tmp_path / 'study.sqlite'}"
    study = a_study(url, space)
    with pytest.raises(KeyboardInterrupt):
        run_trials(study, space, InProcess(workbench(tmp_path, Broken(KeyboardInterrupt()), monkeypatch)), plan(3))
    study.close()
    study = a_study(url, space)
    ticket = study.ask(3)
    assert ticket is not None and ticket.parameters == space.start() and study.tried() == ()
    study.close()
