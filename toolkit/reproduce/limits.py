"""How many steps a run of `toolkit reproduce` does, and for how long."""

from __future__ import annotations

import signal
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


class Reached(Exception):
    """A limit of the run, in words."""


@dataclass
class Limits:
    """How many steps a run does, and for how long."""

    most: int | None
    minutes: float | None
    runs: int = 0
    begun: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> str:
        return f"--budget {self.minutes:g} (minutes) is spent"

    def check(self) -> None:
        """Whether another step may begin.

        Raises:
            Reached: it may not.
        """
        if self.most is not None and self.runs >= self.most:
            raise Reached(f"--max-runs {self.most} is reached")
        if self.minutes is not None and time.monotonic() >= self.begun + 60 * self.minutes:
            raise Reached(self.spent)


@contextmanager
def alarm(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Interrupt the main thread when the time is over, as Ctrl-C does; give a function that says whether it is."""
    rung = threading.Event()

    def ring() -> None:
        rung.set()
        interrupt_main()

    if minutes is None:
        yield lambda: False
        return
    timer = threading.Timer(min(60 * minutes, threading.TIMEOUT_MAX), ring)
    timer.daemon = True
    # a shell lets what it starts in the background ignore the signal
    ignored = threading.current_thread() is threading.main_thread() and not callable(signal.getsignal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler) if ignored else None
    timer.start()
    try:
        yield rung.is_set
    finally:
        timer.cancel()
        if ignored:
            signal.signal(signal.SIGINT, before)
