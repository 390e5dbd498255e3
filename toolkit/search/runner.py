"""Trial after trial: ask the storage what to try, have it done under every seed, tell the storage what came of it."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.artifacts import Proportion
from toolkit.errors import ToolkitError
from toolkit.evaluators.timing import Interval
from toolkit.progress import notice, warn
from toolkit.search.executors import Executor
from toolkit.search.front import Limits, Point
from toolkit.search.objective import Job, Measurement, Outcome
from toolkit.search.problems import Problem
from toolkit.search.space import Space
from toolkit.search.storage import Study, Ticket, Tried

TRACES = "defects"
"""Folder, within that of the search, of the tracebacks of defects."""
DEFECTS_IN_A_ROW = 3
"""After so many in a row, dead workers among them, the search ends: they are hardly those trials' own."""
POLL_S = 1.0
"""Between two looks at what other processes are doing."""


@dataclass(frozen=True)
class Plan:
    """How many trials are made, under which seeds, for how long."""

    trials: int
    seeds: tuple[int, ...]
    limits: Limits
    seconds: float | None = None
    """After which no trial begins; None: all are made."""
    traces: Path | None = None
    """Folder for the tracebacks of defects; None: they are not kept."""


@dataclass
class _UnderWay:
    """A trial of this process, and what is known of it so far."""

    ticket: Ticket
    outcomes: list[Outcome] = field(default_factory=list)


def run_trials(study: Study, space: Space, executor: Executor, plan: Plan) -> None:
    """Make trials until there are as many as wanted, those of other processes included, or the time is spent.

    Raises:
        ToolkitError: a problem that all trials would meet, or a defect in several trials in a row.
    """
    end = None if plan.seconds is None else time.monotonic() + plan.seconds
    under_way: dict[int, _UnderWay] = {}
    waiting, defects = False, 0
    while True:
        expired = end is not None and time.monotonic() >= end
        outstanding = sum(len(plan.seeds) - len(one.outcomes) for one in under_way.values())
        if not expired and outstanding < executor.slots:
            ticket = study.ask(plan.trials)
            if ticket is not None:
                under_way[ticket.number] = _UnderWay(ticket)
                for seed in plan.seeds:
                    executor.submit(Job(ticket.number, space.config(ticket.parameters, seed)))
                continue
        if under_way:
            ended = _take(executor.next(), under_way, study, plan)
            if ended is not None:
                problem = ended.problem
                defects = defects + 1 if problem is not None and (problem.trace or problem.died) else 0
                if defects == DEFECTS_IN_A_ROW:
                    raise _all_defective(ended)
        elif not expired and study.others(plan.trials):
            if not waiting:
                notice("waiting for the trials of other processes")
            waiting = True
            time.sleep(POLL_S)
        else:
            return


def _all_defective(last: Outcome) -> ToolkitError:
    """A GPU that failed, a broken library, or workers that die would use up all trials."""
    assert last.problem is not None
    return ToolkitError(
        f"{DEFECTS_IN_A_ROW} trials in a row met a defect",
        found=f"the last: {last.problem.reason}",
        fix="see whether this machine is in order (toolkit doctor); the same command goes on with other trials",
    )


def _take(outcome: Outcome, under_way: dict[int, _UnderWay], study: Study, plan: Plan) -> Outcome | None:
    """Count what a job came to; with the last of its trial, tell the storage, and return what decided it."""
    one = under_way[outcome.job.trial]
    one.outcomes.append(outcome)
    if outcome.problem is not None and outcome.problem.fatal:
        raise outcome.problem.error()
    if len(one.outcomes) < len(plan.seeds):
        return None
    del under_way[outcome.job.trial]
    for outcome in one.outcomes:
        if outcome.problem is not None:
            study.refuse(one.ticket, outcome.problem.reason)
            tell_problem(f"trial {one.ticket.number} cannot be made", outcome.problem, plan.traces)
            return outcome
    by_seed = {found.job.config.seed: found.measurement for found in one.outcomes}
    measured = [by_seed[seed] for seed in plan.seeds]
    found = [measurement for measurement in measured if measurement is not None]
    point = mean_point(one.ticket.number, found)
    values = {
        "clean": float(np.mean([m.clean.value for m in found])),
        "robust": float(np.mean([m.robust.value for m in found])),
        "ratio": point.ratio.value,
        "bytes": float(point.bytes),
    }
    result = [measurement.record() for measurement in found]
    counted = study.tell(one.ticket, values, result)
    seconds = sum(measurement.seconds["all"] for measurement in found)
    late = "" if counted else "; too late, another process made it again"
    notice(
        f"trial {point.trial}: clean {point.clean.value:.1%}, robust {point.robust.value:.1%}, "
        f"{point.milliseconds:.4g} ms ({point.ratio.value:.2f} of the original's), {point.bytes:,} bytes; "
        f"{seconds:.0f} s; {study.made} of {plan.trials}{late}"
    )
    return outcome


def tell_problem(what: str, problem: Problem, traces: Path | None) -> None:
    """Say that something cannot be made, and why; a defect is said under --quiet too, and its traceback kept."""
    if problem.trace is None:
        notice(f"{what}: {problem.reason}")
        return
    where = ""
    if traces is not None:
        traces.mkdir(exist_ok=True)
        file = traces / f"{re.sub(r'[^a-z0-9]+', '-', what)}.txt"
        file.write_text(problem.trace, encoding="utf-8")
        where = f"; please report what is in {file}"
    warn(f"{what}: {problem.reason}{where}")


def excess_of(limits: Limits, original_ms: float, records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By how much a stored result oversteps each limit on a machine where the original takes so many milliseconds."""
    return limits.excess(on_machine(mean_point(0, [Measurement.of(record) for record in records]), original_ms))


def on_machine(point: Point, original_ms: float) -> Point:
    """The point, whatever machine it is of, as on one where the original takes so many milliseconds.

    Every trial was timed side by side with the original network, beside whatever else its machine did.
    """
    return replace(point, milliseconds=point.ratio.value * original_ms)


def mean_point(trial: int, measured: Sequence[Measurement]) -> Point:
    """One point from the measurements under all seeds; accuracies are means, with the interval of as many images."""
    clean, robust = (
        Proportion(round(float(np.mean([share.correct for share in shares]))), shares[0].total)
        for shares in ([m.clean for m in measured], [m.robust for m in measured])
    )
    times = Interval(*(_geometric([getattr(m.ratio, name) for m in measured]) for name in ("value", "low", "high")))
    return Point(
        trial,
        clean,
        robust,
        _geometric([m.milliseconds for m in measured]),
        times,
        max(m.bytes for m in measured),
        all(m.trusted for m in measured),
    )


def _geometric(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def points_of(tried: Sequence[Tried]) -> list[Point]:
    """The points of all trials that have a result."""
    return [mean_point(one.number, measurements(one)) for one in tried if one.result is not None]


def measurements(one: Tried) -> list[Measurement]:
    """What a trial came to under each seed."""
    return [Measurement.of(record) for record in one.result or ()]
