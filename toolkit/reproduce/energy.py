"""Energy, where the machine can tell: the counters that Linux reads from the processor (RAPL)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
MICRO = 1e-6


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

    They count the whole package, other processes included. Between two readings a counter must not go round twice.
    """
    counters, ranges = {}, {}
    for folder in sorted(root.glob("intel-rapl:?")):  # packages; deeper names are parts of them
        try:
            counters[folder.name] = int((folder / "energy_uj").read_text())
            ranges[folder.name] = int((folder / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            return None
    return Reading(counters, ranges) if counters else None
