"""From what activations are like to the interval that their quantiser represents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import get_args

import numpy as np
import numpy.typing as npt

from toolkit.config import CalibrationName
from toolkit.exporters.observer import Observed

METHODS: tuple[CalibrationName, ...] = get_args(CalibrationName)
LEVELS = 255
"""Steps between the ends of a uint8 grid."""
LEAST_INSIDE = 0.9
"""Share of the values that an interval has to hold for `entropy` to consider it."""
SHARES = np.geomspace(0.01, 1, 193)
"""Of each end, what `entropy` and `mse` try."""
SWEEPS = 2
"""How often the two ends are chosen in turn."""

Float64Array = npt.NDArray[np.float64]
Interval = tuple[float, float]
Error = Callable[[Float64Array, Float64Array, float, float], float]


def choose_range(observed: Observed, method: CalibrationName, percentile: float) -> Interval:
    """The ends of the interval that a quantiser is to represent; it holds 0.

    Args:
        observed: the tensor; with a histogram, except for `minmax` and `moving-average`.
        method: `minmax`: all values. `moving-average`: the mean over the batches of their extremes. `percentile`: all
            but the same share at either end. `mse`: where the mean squared error of rounding and clipping is least.
            `entropy`: where the Kullback-Leibler divergence from the histogram to its rounded form is least (Migacz
            2017, there for one end).
        percentile: in (50, 100], of the upper end; the lower end is at 100 minus that.
    """
    return _RULES[method](observed, percentile)


def needs_histogram(method: CalibrationName) -> bool:
    """Whether the method looks at more than the extremes."""
    return method not in ("minmax", "moving-average")


def _minmax(observed: Observed, _: float) -> Interval:
    return min(observed.low, 0.0), max(observed.high, 0.0)


def _moving_average(observed: Observed, _: float) -> Interval:
    return min(observed.mean_low, 0.0), max(observed.mean_high, 0.0)


def _percentile(observed: Observed, percentile: float) -> Interval:
    values, counts = _distribution(observed)
    values, counts = np.append(values, 0.0), np.append(counts, observed.zeros)
    order = np.argsort(values)
    reached = np.cumsum(counts[order])
    share = (100 - percentile) / 100 * reached[-1]
    low = values[order][np.searchsorted(reached, share, side="right")] if share else observed.low
    high = values[order][np.searchsorted(reached, reached[-1] - share)] if share else observed.high
    return min(float(low), 0.0), max(float(high), 0.0)


def _search(error: Error, observed: Observed, _: float) -> Interval:
    """Choose one end after the other, each the one of least error; both begin at the extremes."""
    low, high = _minmax(observed, 0)
    values, counts = _distribution(observed)
    if not counts.any():
        return low, high
    lows, highs = low * SHARES, high * SHARES
    for _sweep in range(SWEEPS):
        if high > 0:
            high = float(min(highs, key=lambda end: error(values, counts, low, end)))
        if low < 0:
            low = float(min(lows, key=lambda end: error(values, counts, end, high)))
    return low, high


def _distribution(observed: Observed) -> tuple[Float64Array, Float64Array]:
    """Values that occur and how often, zeros left out."""
    if observed.counts is None:
        raise ValueError("this method needs a histogram")
    present = observed.counts > 0
    return observed.centres[present], observed.counts[present].astype(np.float64)


def _levels(values: Float64Array, low: float, high: float) -> tuple[Float64Array, float, float]:
    """The level of every value in the grid of [low, high], its step and its zero point."""
    step = (high - low) / LEVELS
    zero_point = float(np.round(-low / step))
    return np.clip(np.round(values / step) + zero_point, 0, LEVELS), step, zero_point


def squared_error(values: Float64Array, counts: Float64Array, low: float, high: float) -> float:
    """Sum over all values of the squared error that rounding to the grid of [low, high] makes."""
    levels, step, zero_point = _levels(values, low, high)
    return float((counts * ((levels - zero_point) * step - values) ** 2).sum())


def divergence(values: Float64Array, counts: Float64Array, low: float, high: float) -> float:
    """Kullback-Leibler divergence from the values, clipped to [low, high], to what the grid's levels tell of them.

    Each level's values (those that are clipped to it left out) are spread evenly over the parts of the histogram that
    round to it and hold any.
    """
    levels, step, _ = _levels(values, low, high)
    index = levels.astype(np.int64)
    inside = (values >= low - step / 2) & (values <= high + step / 2)
    if not inside.any():
        return float("inf")
    clipped = np.clip(values, low, high)
    reference = counts.copy()
    reference[~inside] = 0
    for outside, edge in ((values < low - step / 2, np.argmin), (values > high + step / 2, np.argmax)):
        if outside.any():
            kept = np.flatnonzero(inside)
            reference[kept[int(edge(clipped[kept]))]] += counts[outside].sum()
    held = np.bincount(index[inside], minlength=LEVELS + 1)
    mass = np.bincount(index[inside], weights=counts[inside], minlength=LEVELS + 1)
    p = reference[inside] / reference.sum()
    q = (mass / np.maximum(held, 1))[index[inside]] / counts[inside].sum()
    return float((p * np.log(p / q)).sum())


def _divergence_of_most(values: Float64Array, counts: Float64Array, low: float, high: float) -> float:
    """The divergence, without end where the interval leaves out too many values.

    Of values far from 0 the first part of the histogram that holds any would else be all that is kept, and fit.
    """
    inside = counts[(values >= low) & (values <= high)].sum()
    return divergence(values, counts, low, high) if inside >= LEAST_INSIDE * counts.sum() else float("inf")


_RULES: Mapping[CalibrationName, Callable[[Observed, float], Interval]] = {
    "minmax": _minmax,
    "moving-average": _moving_average,
    "percentile": _percentile,
    "entropy": partial(_search, _divergence_of_most),
    "mse": partial(_search, squared_error),
}
