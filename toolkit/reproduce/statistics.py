"""Means and standard errors over seeds, and whether they agree with the paper's."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from toolkit.artifacts import Z_95, Proportion
from toolkit.reproduce.paper import PAPER_SEEDS, Figure

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
    error: float | None
    """Standard error of the difference, from those parts that are known; None: nothing tells how trainings vary."""
    parts: str
    """Which those are."""
    p_value: float | None = None
    """Welch's test of one mean for both; None unless each side has a standard error over seeds."""

    @property
    def within(self) -> bool | None:
        return None if self.error is None else abs(self.difference) <= WITHIN * self.error

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.difference:+.2f}, not judged ({self.parts})"
        sign = "within" if self.within else "OUTSIDE"
        return f"{self.difference:+.2f}, {sign} 2 x {self.error:.2f} ({self.parts})"


def compare(ours: Mean, theirs: Figure) -> Agreement:
    """The difference of the means and its combined standard error, root of the sum of squares.

    Both are of the same test images, so what parts them is how trainings vary. Of one seed that is not known: where the
    paper gives an error its seeds' spread stands in, else the difference is not judged. Of one network for all seeds,
    or several that agree to the last image, our part is the error that the finite number of test images causes. Where
    the paper gives no error its part is left out, and the error is too small.
    """
    difference = ours.value - theirs.mean
    known = [] if theirs.error is None else [theirs.error]
    parts = [] if theirs.error is None else ["the paper's"]
    if ours.error:
        known.append(ours.error)
        parts.insert(0, f"our {len(ours.shares)} seeds")
    elif ours.one_network or len(ours.shares) > 1:
        known.append(ours.sampling_error)
        parts.insert(0, "test images alone")
    elif theirs.error is not None:
        known.append(theirs.error * math.sqrt(PAPER_SEEDS))
        parts = ["the paper's, and the spread of its seeds for our one"]
    else:
        return Agreement(difference, None, "one seed, and the paper gives no error")
    return Agreement(difference, math.hypot(*known), " and ".join(parts), _welch(ours, theirs))


def _welch(ours: Mean, theirs: Figure) -> float | None:
    """Two-sided chance that means of one expectation differ so much, by seeds as few and as unlike (Welch 1947)."""
    if not ours.error or not theirs.error:
        return None
    from scipy import stats

    return float(
        stats.ttest_ind_from_stats(
            *(ours.value, ours.error * math.sqrt(len(ours.shares)), len(ours.shares)),
            *(theirs.mean, theirs.error * math.sqrt(PAPER_SEEDS), PAPER_SEEDS),
            equal_var=False,
        ).pvalue
    )


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """p-values as they stand when so many hypotheses are tested at once, in their order (Holm 1979)."""
    ranked = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(ranked):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = least
    return tuple(corrected)


def first_repeated(seeds: Sequence[int]) -> int | None:
    """The first seed that stands more than once; None if all differ."""
    return next((seed for number, seed in enumerate(seeds) if seed in seeds[:number]), None)
