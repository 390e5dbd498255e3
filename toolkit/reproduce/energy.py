"""Energy, where the machine can tell: the counters that Linux reads from the processor (RAPL)."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
MICRO = 1e-6
EVERY = 60.0
"""Seconds between two readings: a counter goes round after 262 kJ on many processors, 11 minutes at 400 W."""


@dataclass(frozen=True)
class Reading:
    """The counters of all processor packages, in microjoules, and where each begins again."""

    counters: Mapping[str, int]
    ranges: Mapping[str, int]

    def since(self, earlier: Reading) -> float:
        """Joules between the two readings; a counter that began again counts once around."""
        total = 0
        for name, value in self.counters.items():
            spent = value - earlier.counters.get(name, value)
            total += spent if spent >= 0 else spent + self.ranges[name]
        return MICRO * total


def joules(root: Path = POWERCAP) -> Reading | None:
    """The counters now; None where there are none, or this process may not read them.

    They count whole packages, other processes included. Between two readings a counter must not go round twice.
    """
    counters, ranges = {}, {}
    for folder in sorted(root.glob("intel-rapl:*")):
        try:
            if not (folder / "name").read_text().startswith("package"):  # part of one, or the platform around them
                continue
            counters[folder.name] = int((folder / "energy_uj").read_text())
            ranges[folder.name] = int((folder / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            return None
    return Reading(counters, ranges) if counters else None


class Meter:
    """Joules of all packages from its making on, read in a thread so often that no counter goes round in between.

    Args:
        root: where the counters are.
        every: seconds between two readings.
    """

    def __init__(self, root: Path = POWERCAP, every: float = EVERY) -> None:
        self._root, self._every = root, every
        self._total: float | None = 0.0
        self._last = joules(root)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="energy", daemon=True)
        if self._last is not None:
            self._thread.start()

    def stop(self) -> float | None:
        """Joules since the beginning; None where they cannot be read."""
        self._done.set()
        if self._last is None:
            return None
        self._thread.join()
        self._read()
        return self._total

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            self._read()

    def _read(self) -> None:
        now = joules(self._root)
        if now is None or self._last is None or self._total is None:
            self._total = None  # a sum with an unknown part is unknown
        else:
            self._total += now.since(self._last)
            self._last = now
