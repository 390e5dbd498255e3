"""Whether other processes take the CPU from a training of several threads.

Threads that compute together wait for each other by spinning. Where another process has one of their cores, each wait
lasts as long as the system's slice: on two cores, beside one busy process, a step of two threads took 30 times as long.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

import torch

from toolkit.evaluators.timing import foreign_load, own_cpus
from toolkit.progress import warn

LOOK_AFTER_S = 10.0
TAKEN = 0.5
"""So much of one CPU, and threads wait for it."""


class CrowdWatch:
    """Says once, some seconds into a training, that the machine is busy with other work, if it is."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._load = self._stack.enter_context(foreign_load())
        self._begun: float | None = time.monotonic()

    def look(self) -> None:
        """After a step."""
        if self._begun is None or time.monotonic() - self._begun < LOOK_AFTER_S:
            return
        self._begun = None
        self._stack.close()
        load, threads, cpus = self._load(), torch.get_num_threads(), len(own_cpus())
        if threads > 1 and load * cpus > TAKEN:
            fewer = max(1, min(int(cpus * (1 - load)), threads - 1))
            warn(
                f"other processes take {load:.0%} of the CPU time: {threads} threads, which wait for each other, "
                f"may be many times slower than --threads {fewer}"
            )
