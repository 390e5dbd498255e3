"""An evaluation under way: its judges, images, conditions, and what is known so far."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

from toolkit.artifacts import Int64Array, Normalization, Split, evaluation_batch
from toolkit.attacks.ensemble import Pass
from toolkit.attacks.threat import PgdPlan
from toolkit.evaluators.journal import Journal
from toolkit.evaluators.scoring import Judges, Ledger

NO_NETWORK = "there is no network to make it on"
"""Why an attack that needs gradients is not run on a graph that has no twin."""


class Clock:
    """Time that may be spent.

    Args:
        seconds: from now on; None: as long as it takes.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def expired(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end


@dataclass(frozen=True)
class Conditions:
    """How an evaluation is made, beside its networks and images."""

    plan: PgdPlan
    """Threat model, and the schedule of the transfer matrix's attack."""
    normalization: Normalization
    """Of the network, for a ball that lies behind it."""
    seed: int
    """Of everything random; every part has its own from it, so that the figures do not depend on what ran before."""
    passes: tuple[Pass, ...] = ()
    """The attacks of the worst case, in addition to the matrix."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the surrogates' gradients; scoring is always in float32."""
    input_range: tuple[float, float] | None = None
    """Pixels that the deployed graph's input quantiser represents."""
    probes: bool = True
    """Whether the steps and radii of attacks are varied too: a third of a short evaluation's time."""

    @property
    def keep_near(self) -> float | None:
        """From which progress on attacked images are kept for passes that go on from them; None: none does."""
        return min((how.near for how in self.passes if how.onward), default=None)


@dataclass(frozen=True)
class Evaluation:
    """What all attacks of one evaluation share."""

    judges: Judges
    ledger: Ledger
    split: Split
    conditions: Conditions
    journal: Journal
    clock: Clock

    def chunks(self, indices: Int64Array, copies: int = 1) -> list[Int64Array]:
        """The positions of images, as many at a time as are attacked together, each in so many copies."""
        size = max(1, evaluation_batch(self.split.images.shape) // copies)
        return [indices[start : start + size] for start in range(0, len(indices), size)]
