"""Means and standard errors over seeds, and whether they agree with the paper's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.artifacts import Z_95, Proportion
from toolkit.reproduce.paper import Figure

WITHIN = 2.0
"""Standard errors within which two means agree."""


@dataclass(frozen=True)
class Mean:
    """A share over seeds, in per cent."""

    shares: tuple[Proportion, ...]
    """One a seed, all of the same test images."""
    one_network: bool = False
    """Whether the seeds share one network, so that their spread says nothing of how training varies."""

    @property
    def value(self) -> float:
        return 100 * statistics.fmean(share.value for share in self.shares)

    @property
    def error(self) -> float | None:
        """The standard error of the mean over seeds; None of one seed, and of one network."""
        if len(self.shares) < 2 or self.one_network:
            return None
        return 100 * statistics.stdev(share.value for share in self.shares) / math.sqrt(len(self.shares))

    @property
    def sampling_error(self) -> float:
        """The standard error that the finite number of test images alone causes, by Wilson's interval's longer arm."""
        share = self._share
        return 100 * max(share.high - share.value, share.value - share.low) / Z_95

    @property
    def _share(self) -> Proportion:
        """The mean as a share of the test images: more seeds make no more images."""
        total = self.shares[0].total
        return Proportion(round(total * self.value / 100), total)

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.value:.2f} ± {self.error:.2f}"
        share = self._share
        return f"{self.value:.2f} [{100 * share.low:.2f}, {100 * share.high:.2f}]"


@dataclass(frozen=True)
class Agreement:
    """Our mean against the paper's."""

    difference: float
    """Ours minus the paper's, in points."""
    error: float
    """Standard error of the difference, from those parts that are known."""
    parts: str
    """Which those are."""

    @property
    def within(self) -> bool:
        return abs(self.difference) <= WITHIN * self.error

    def __str__(self) -> str:
        sign = "within" if self.within else "OUTSIDE"
        return f"{self.difference:+.2f}, {sign} 2 x {self.error:.2f} ({self.parts})"


def compare(ours: Mean, theirs: Figure) -> Agreement:
    """The difference of the means and its combined standard error, root of the sum of squares.

    Of one network, or several that agree to the last image, our part is the error that the finite number of test images
    causes; that leaves the spread of seeds out, and is too small. Where the paper gives no error its part is left out
    too.
    """
    known = [ours.error or ours.sampling_error]
    parts = [f"our {len(ours.shares)} seeds" if ours.error else "test images alone"]
    if theirs.error is not None:
        known.append(theirs.error)
        parts.append("the paper's")
    return Agreement(ours.value - theirs.mean, math.hypot(*known), " and ".join(parts))


def first_repeated(seeds: Sequence[int]) -> int | None:
    """The first seed that stands more than once; None if all differ."""
    return next((seed for number, seed in enumerate(seeds) if seed in seeds[:number]), None)
