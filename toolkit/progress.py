"""Progress on stderr: a bar with the time left on a terminal, plain lines elsewhere; silent under --quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

PLAIN_INTERVAL_S = 10.0
"""Seconds between two plain lines of one task."""

_quiet = False


def set_quiet(quiet: bool) -> None:
    """Silence (or restore) all progress and notices of this process."""
    global _quiet
    _quiet = quiet


def warn(text: str) -> None:
    """One line that the user must see, under --quiet too."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


class Task(Protocol):
    """One piece of long work."""

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Report `amount` more units done; `note` is shown behind the bar."""
        ...


def notice(text: str) -> None:
    """One line for the user on stderr."""
    if not _quiet:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def task(label: str, total: int) -> Iterator[Task]:
    """Show the progress of `total` units of work named `label`."""
    if _quiet:
        yield _Silent()
    elif sys.stderr.isatty():
        with _bar(label, total) as bar:
            yield bar
    else:
        plain = _Plain(label, total)
        yield plain
        plain.finish()


class _Silent:
    def advance(self, amount: int = 1, note: str = "") -> None:
        pass


class _Plain:
    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._start = self._last = time.monotonic()
        self._note = ""

    def advance(self, amount: int = 1, note: str = "") -> None:
        self._done += amount
        self._note = note or self._note
        now = time.monotonic()
        if now - self._last >= PLAIN_INTERVAL_S and self._done:
            self._last = now
            left = (now - self._start) / self._done * (self._total - self._done)
            notice(f"{self._label}: {self._done}/{self._total}, {left:.0f} s left {self._note}".rstrip())

    def finish(self) -> None:
        notice(f"{self._label}: done in {time.monotonic() - self._start:.1f} s {self._note}".rstrip())


class _Bar:
    def __init__(self, label: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
        self._id = self.progress.add_task(label, total=total, note="")

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.progress.advance(self._id, amount)
        if note:
            self.progress.update(self._id, note=note)


@contextmanager
def _bar(label: str, total: int) -> Iterator[Task]:
    bar = _Bar(label, total)
    with bar.progress:
        yield bar
