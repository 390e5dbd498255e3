"""A search whose trials cost nothing: what a configuration comes to is a formula."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from toolkit.artifacts import Proportion
from toolkit.config import ModelConfig, SearchConfig, SearchRunConfig
from toolkit.evaluators.timing import Interval
from toolkit.search.executors import InProcess
from toolkit.search.front import Limits
from toolkit.search.objective import Job, Measurement, Outcome
from toolkit.search.problems import Problem
from toolkit.search.runner import Plan, run_trials
from toolkit.search.space import Anatomy, Space
from toolkit.search.storage import Study, Ticket

ANATOMY = Anatomy(("first", "middle", "last"), (("0",), ("2.conv", "4")))


def config(space: str = "prune.ratio=0.1:0.9:0.1; precision=int8,float", **search: Any) -> SearchRunConfig:
    return SearchRunConfig(
        model=ModelConfig(path=Path("model.pt")), search=SearchConfig.model_validate({"space": space, **search})
    )


def a_space(space: str = "prune.ratio=0.1:0.9:0.1; precision=int8,float") -> Space:
    return Space(config(space), ANATOMY)


def a_study(
    url: str,
    space: Space | None = None,
    *,
    seed: int = 0,
    name: str = "search",
    identity: Mapping[str, Any] = MappingProxyType({}),
) -> Study:
    return Study(url, name, space or a_space(), {"weights": "abc", **identity}, seed)


def measured(job: Job) -> Measurement:
    """Less accurate, faster and smaller the more is pruned; integers are faster and cost nothing."""
    ratio, int8 = job.config.prune.ratio, job.config.quantize.int8
    relative = (1 - ratio) * (0.5 if int8 else 1.0)
    return Measurement(
        clean=Proportion(round(900 - 400 * ratio), 1000),
        robust=Proportion(round(800 - 500 * ratio**2), 1000),
        milliseconds=relative,
        ratio=Interval(relative, 0.9 * relative, 1.1 * relative),
        trusted=True,
        bytes=round(100_000 * relative),
        quantize=job.config.quantize.model_dump(mode="json"),
        seconds={"all": 0.0},
    )


@dataclass(frozen=True)
class FakeWork:
    """Notes in a file what it was asked to do, and by which process it was done."""

    log: str
    seconds: float = 0.0
    dies_at: int | None = None
    """The worker that is the first to be given this trial kills itself."""
    fails_at: int | None = None
    fatal: bool = False

    def __call__(self, job: Job) -> Outcome:
        self._note("begin", job)
        time.sleep(self.seconds)
        if job.trial == self.dies_at and self._is_first():
            os.kill(os.getpid(), signal.SIGKILL)
        if job.trial == self.fails_at:
            return Outcome(job, problem=Problem("it failed", "a reason", "a fix", self.fatal))
        self._note("end", job)
        return Outcome(job, measured(job))

    def _is_first(self) -> bool:
        try:
            Path(f"{self.log}.died").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _note(self, what: str, job: Job) -> None:
        with Path(self.log).open("a") as file:
            file.write(f"{what} {job.trial} {job.config.seed} {os.getpid()}\n")


def noted(log: Path, what: str) -> list[tuple[int, int, int]]:
    """(trial, seed, process) of every note."""
    rows = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(int(trial), int(seed), int(process)) for kind, trial, seed, process in rows if kind == what]


def plan(
    trials: int, *, seeds: tuple[int, ...] = (0,), seconds: float | None = None, traces: Path | None = None
) -> Plan:
    return Plan(trials, seeds, Limits(min_robust=0.6), seconds, traces)


def main() -> None:
    """One of several processes on a storage: URL, log, number of trials, seconds each."""
    url, log, trials, seconds = sys.argv[1:]
    space = a_space()
    study = a_study(url, space)
    try:
        run_trials(study, space, InProcess(FakeWork(log, float(seconds))), plan(int(trials)))
    finally:
        study.close()


if __name__ == "__main__":
    main()


VALUES = {"clean": 0.9, "robust": 0.7, "ratio": 0.5, "bytes": 10.0}


def tell(study: Study, ticket: Ticket) -> bool:
    job = Job(ticket.number, a_space().config(ticket.parameters))
    return study.tell(ticket, VALUES, [measured(job).record()])


def ask(study: Study, wanted: int = 99) -> Ticket:
    ticket = study.ask(wanted)
    assert ticket is not None
    return ticket
