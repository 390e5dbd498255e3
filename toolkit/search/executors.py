"""Who does the jobs of a search: this process, or (`cluster`) others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from toolkit.search.objective import Job, Outcome

Work = Callable[[Job], Outcome]


class Executor(Protocol):
    """Does jobs, some at a time."""

    @property
    def slots(self) -> int:
        """How many jobs it does at a time."""
        ...

    def submit(self, job: Job) -> None:
        """Begin a job, or queue it."""
        ...

    def next(self) -> Outcome:
        """Wait for a job to be done; there must be one."""
        ...

    def close(self) -> None:
        """Drop what is not done."""
        ...


class InProcess:
    """Does one job after the other, in this process."""

    slots = 1

    def __init__(self, work: Work) -> None:
        self._work = work
        self._queue: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    def next(self) -> Outcome:
        return self._work(self._queue.popleft())

    def close(self) -> None:
        self._queue.clear()
