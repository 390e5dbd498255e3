"""The Pareto set, the user's limits, and which point to ship."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from toolkit.artifacts import Proportion
from toolkit.config import SearchRunConfig
from toolkit.evaluators.timing import Interval

Objective = Literal["clean", "robust", "milliseconds", "bytes"]
WORDS: dict[Objective, str] = {
    "clean": "clean accuracy",
    "robust": "robust accuracy",
    "milliseconds": "latency",
    "bytes": "size",
}


ALIKE = 0.05
"""Times and sizes that differ by less are not worth an objective of their own."""


@dataclass(frozen=True)
class Point:
    """One trial with its evidence, cheap or full; figures are those of the deployed graph."""

    trial: int
    clean: Proportion
    robust: Proportion
    milliseconds: float
    ratio: Interval
    """Time over that of the original network's float graph."""
    bytes: int
    trusted: bool

    def tells(self) -> dict[Objective, float]:
        """The difference that its evidence can tell: the 95 % interval of a share, a few per cent of time and size."""
        return {
            "clean": self.clean.high - self.clean.low,
            "robust": self.robust.high - self.robust.low,
            "milliseconds": ALIKE * self.milliseconds,
            "bytes": ALIKE * self.bytes,
        }

    def losses(self) -> dict[Objective, float]:
        """What is to be small."""
        return {
            "clean": 1 - self.clean.value,
            "robust": 1 - self.robust.value,
            "milliseconds": self.milliseconds,
            "bytes": float(self.bytes),
        }


@dataclass(frozen=True)
class Limits:
    """What the user asks of the deployed graph; None: anything will do."""

    min_accuracy: float | None = None
    min_robust: float | None = None
    max_latency: float | None = None
    max_size: int | None = None

    @classmethod
    def of(cls, config: SearchRunConfig) -> Limits:
        gates, search = config.gates, config.search
        return cls(gates.min_accuracy, gates.min_robust, search.max_latency, search.max_size)

    @property
    def limited(self) -> tuple[Objective, ...]:
        """The objectives that have a limit."""
        given: dict[Objective, float | None] = {
            "clean": self.min_accuracy,
            "robust": self.min_robust,
            "milliseconds": self.max_latency,
            "bytes": self.max_size,
        }
        return tuple(name for name, limit in given.items() if limit is not None)

    def excess(self, point: Point) -> dict[str, float]:
        """By flag: by how much a point oversteps a limit, at most 0 where it keeps it.

        Accuracies are differences, latency and size shares of their limit.
        """
        return self._excess(point.clean.value, point.robust.value, point.milliseconds, point.bytes)

    def may_keep(self, point: Point) -> bool:
        """Whether the point keeps all limits within the intervals of its figures."""
        fastest = point.milliseconds * point.ratio.low / point.ratio.value
        return _kept(self._excess(point.clean.high, point.robust.high, fastest, point.bytes))

    def kept(self, point: Point) -> bool:
        """Whether the point keeps all limits."""
        return _kept(self.excess(point))

    def _excess(self, clean: float, robust: float, milliseconds: float, size: int) -> dict[str, float]:
        found: dict[str, float] = {}
        if self.min_accuracy is not None:
            found["--min-accuracy"] = self.min_accuracy - clean
        if self.min_robust is not None:
            found["--min-robust"] = self.min_robust - robust
        if self.max_latency is not None:
            found["--max-latency"] = milliseconds / self.max_latency - 1
        if self.max_size is not None:
            found["--max-size"] = size / self.max_size - 1
        return found


def _kept(excess: Mapping[str, float]) -> bool:
    return all(amount <= 0 for amount in excess.values())


def missed(point: Point, limits: Limits) -> float:
    """How far a point is from keeping all limits: the sum of what it oversteps."""
    return sum(max(0.0, amount) for amount in limits.excess(point).values())


def dominates(first: Point, second: Point) -> bool:
    """Whether the first is at least as good in everything, and better in something."""
    ours, theirs = first.losses(), second.losses()
    return all(ours[name] <= theirs[name] for name in ours) and any(ours[name] < theirs[name] for name in ours)


def pareto(points: Sequence[Point]) -> list[Point]:
    """The points that no other dominates, in the order given."""
    return [point for point in points if not any(dominates(other, point) for other in points)]


def distances(points: Sequence[Point], over: Sequence[Objective]) -> dict[int, float]:
    """By trial: how far a point is from the best of each objective.

    The unit is the range among the points, or what the evidence can tell where that is more: of two points that differ
    in one image, none is far from the other.
    """
    losses = {point.trial: point.losses() for point in points}
    found = dict.fromkeys(losses, 0.0)
    for name in over:
        column = [row[name] for row in losses.values()]
        low = min(column)
        spread = max(max(column) - low, *(point.tells()[name] for point in points))
        for trial, row in losses.items():
            found[trial] += ((row[name] - low) / spread) ** 2 if spread else 0.0
    return {trial: math.sqrt(total / len(over)) for trial, total in found.items()}


def aims(limits: Limits) -> tuple[Objective, ...]:
    """What is still to be made good once the limits are kept: the objectives without one; all, if all have one."""
    return tuple(name for name in WORDS if name not in limits.limited) or tuple(WORDS)


@dataclass(frozen=True)
class Recommendation:
    """The point to ship, or the nearest to what was asked for, and why."""

    point: Point
    keeps: bool
    """Whether it keeps all limits."""
    why: str


def recommend(points: Sequence[Point], limits: Limits) -> Recommendation:
    """Of the points that keep all limits, the one nearest to the best of what has no limit.

    Limits say what is enough; beyond them an objective counts no more. Where all objectives have one, or none has, all
    count alike.

    Args:
        points: at least one.
        limits: the user's.
    """
    keeping = pareto([point for point in points if limits.kept(point)])
    if not keeping:
        nearest = min(points, key=lambda point: (missed(point, limits), point.trial))
        overstepped = [_overstepped(flag, amount) for flag, amount in limits.excess(nearest).items() if amount > 0]
        why = f"no point keeps all limits; this one is nearest, and misses {' and '.join(overstepped)}"
        return Recommendation(nearest, False, why)
    over = aims(limits)
    far = distances(keeping, over)
    best = min(keeping, key=lambda point: (far[point.trial], point.trial))
    return Recommendation(best, True, _reason(best, keeping, limits, over))


def _overstepped(flag: str, amount: float) -> str:
    return f"{flag} by {100 * amount:.2f} points" if flag.startswith("--min") else f"{flag} by {amount:.1%}"


def _reason(best: Point, keeping: Sequence[Point], limits: Limits, over: Sequence[Objective]) -> str:
    names = " and ".join(filter(None, (", ".join(WORDS[name] for name in over[:-1]), WORDS[over[-1]])))
    start = "keeps all limits, and of " if limits.limited else "of "
    parts = [f"{start}{len(keeping)} such point(s) is nearest to the best in {names}"]
    for name in over:
        winner = min(keeping, key=lambda point: point.losses()[name])
        if winner.losses()[name] < best.losses()[name]:
            parts.append(f"trial {winner.trial} is better in {WORDS[name]} ({_difference(name, winner, best)})")
    return "; ".join(parts)


def _difference(name: Objective, winner: Point, best: Point) -> str:
    gain = best.losses()[name] - winner.losses()[name]
    if name in ("milliseconds", "bytes"):
        return f"{gain / best.losses()[name]:.0%} less"
    return f"{100 * gain:.2f} points{', within the interval' if gain < best.tells()[name] else ''}"


def finalists(points: Sequence[Point], limits: Limits) -> list[Point]:
    """The order in which points of the front deserve full evidence.

    First come those that keep the limits: the one to recommend, then the best in each objective, then the rest by how
    near they are to the best of everything; after them those that do not, the nearest first.
    """
    front = pareto(points)
    keeping = [point for point in front if limits.kept(point)]
    ordered: list[Point] = []
    if keeping:
        ordered.append(recommend(keeping, limits).point)
        ordered += [min(keeping, key=_loss(name)) for name in ("robust", "milliseconds", "clean", "bytes")]
        far = distances(keeping, tuple(WORDS))
        ordered += sorted(keeping, key=lambda point: far[point.trial])
    ordered += sorted(front, key=lambda point: (missed(point, limits), point.trial))
    return list({point.trial: point for point in ordered}.values())


def _loss(name: Objective) -> Callable[[Point], float]:
    return lambda point: point.losses()[name]
