from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from toolkit.config import CalibrationName
from toolkit.exporters.observer import BINS, Observed
from toolkit.exporters.ranges import METHODS, choose_range, divergence, needs_histogram, squared_error

Values = npt.NDArray[np.float64]


def observed(values: Values) -> Observed:
    """As the observer sees one batch of them."""
    low, high = float(values.min()), float(values.max())
    present = torch.from_numpy(values[values != 0])
    counts = torch.histc(present, BINS, low, high).to(torch.int64).numpy() if high > low else np.zeros(BINS, np.int64)
    return Observed(low, high, low, high, counts, int((values == 0).sum()))


def rounding_error(values: Values, low: float, high: float) -> float:
    """Of the values themselves, in the words of the ONNX standard."""
    step = (high - low) / 255
    zero_point = np.rint(-low / step)
    levels = np.clip(np.rint(values / step) + zero_point, 0, 255)
    return float((((levels - zero_point) * step - values) ** 2).sum())


@given(arrays.arrays(np.float64, st.integers(1, 60), elements=st.floats(-100, 100, width=32)))
@settings(max_examples=60, deadline=None)
def test_every_range_holds_zero_and_none_is_wider_than_the_values(values: Values) -> None:
    for method in METHODS:
        low, high = choose_range(observed(values), method, 99.0)
        assert min(values.min(), 0) <= low <= 0 <= high <= max(values.max(), 0), method


def test_all_values_of_one_kind_are_represented_whole() -> None:
    for method in METHODS:
        for value in (0.0, 3.0, -3.0):
            low, high = choose_range(observed(np.full(9, value)), method, 99.99)
            assert (low, high) == (min(value, 0), max(value, 0)), (method, value)


def test_extremes_and_their_means() -> None:
    seen = Observed(-4.0, 8.0, -3.0, 6.0, None)
    assert choose_range(seen, "minmax", 99) == (-4, 8)
    assert choose_range(seen, "moving-average", 99) == (-3, 6)
    assert [needs_histogram(method) for method in METHODS] == [False, False, True, True, True]
    with pytest.raises(ValueError, match="histogram"):
        choose_range(seen, "mse", 99)


@pytest.mark.parametrize("percentile", [90.0, 99.0, 100.0])
@pytest.mark.parametrize("zeros", [0, 5000])
def test_percentiles_are_those_of_the_values_zeros_included(percentile: float, zeros: int) -> None:
    values = np.concatenate([np.random.default_rng(0).normal(0, 1, 10_000), np.zeros(zeros)])
    found = choose_range(observed(values), "percentile", percentile)
    wanted = np.percentile(values, (100 - percentile, percentile))
    assert np.allclose(found, wanted, atol=3 * np.ptp(values) / BINS + (0.02 if percentile == 99 else 0.01))


@pytest.mark.parametrize("shape", ["normal", "half", "outlier", "two-sided"])
def test_the_range_of_least_squared_error_beats_a_finer_search(shape: str) -> None:
    """No pair of ends from a grid of its own comes out more than 1 % better on the values themselves."""
    generator = np.random.default_rng(1)
    values = {
        "normal": generator.normal(0, 1, 20_000),
        "half": np.maximum(generator.normal(0, 1, 20_000), 0),
        "outlier": np.append(np.maximum(generator.normal(0, 1, 20_000), 0), 60.0),
        "two-sided": np.append(generator.exponential(1, 20_000), -generator.exponential(0.2, 4000)),
    }[shape]
    low, high = choose_range(observed(values), "mse", 99)
    ends = np.linspace(0.05, 1, 60)
    lows = ends * values.min() if values.min() < 0 else [0.0]
    best = min(rounding_error(values, a, b) for a, b in itertools.product(lows, ends * values.max()))
    assert rounding_error(values, low, high) <= 1.01 * best


def test_the_histogram_s_error_is_that_of_the_values() -> None:
    values = np.random.default_rng(2).normal(0, 1, 50_000)
    seen = observed(values)
    assert seen.counts is not None
    for low, high in ((-1.0, 2.0), (-3.0, 3.0)):
        found = squared_error(seen.centres, seen.counts.astype(np.float64), low, high)
        assert found == pytest.approx(rounding_error(values, low, high), rel=0.01)


def test_divergence_by_hand() -> None:
    """Two parts round to one level and are told apart no more: each is taken for their mean."""
    values, counts = np.array([100.0, 100.2, 200.0]), np.array([1.0, 3.0, 4.0])
    wanted = 1 / 8 * np.log((1 / 8) / (2 / 8)) + 3 / 8 * np.log((3 / 8) / (2 / 8))
    assert divergence(values, counts, 0.0, 255.0) == pytest.approx(wanted)
    assert divergence(values, counts, 0.0, 510.0) == pytest.approx(wanted)
    assert divergence(np.array([100.0, 101.0, 200.0]), counts, 0.0, 255.0) == pytest.approx(0)


def test_what_is_clipped_counts_at_the_edge_for_the_reference_alone() -> None:
    """Of 10 values 4 lie beyond the end: the edge has (2 + 4) / 10, and 2 / 6 in its rounded form."""
    values, counts = np.array([50.0, 100.0, 200.0]), np.array([4.0, 2.0, 4.0])
    wanted = 0.4 * np.log(0.4 / (4 / 6)) + 0.6 * np.log(0.6 / (2 / 6))
    assert divergence(values, counts, 0.0, 100.0) == pytest.approx(wanted)
    assert divergence(-values, counts, -100.0, 0.0) == pytest.approx(wanted)
    assert divergence(values, counts, 0.0, 1.0) == np.inf


@pytest.mark.parametrize("method", ["entropy", "mse"])
def test_what_is_spread_evenly_is_not_clipped(method: CalibrationName) -> None:
    flat = np.random.default_rng(3).uniform(0, 1, 50_000)
    assert choose_range(observed(flat), method, 99)[1] > 0.94


@pytest.mark.parametrize(("low", "high", "count"), [(0.45, 0.955, 2_000), (0.3, 0.918, 8_000)])
def test_entropy_does_not_clip_nearly_all_of_what_lies_far_from_zero(low: float, high: float, count: int) -> None:
    """As pooled features and gates do: the first part of the histogram that holds any would fit perfectly."""
    values = np.random.default_rng(1).uniform(low, high, count)
    least, most = choose_range(observed(values), "entropy", 99)
    assert least == 0 and (values > most).mean() < 0.05


def test_a_far_outlier_is_clipped_by_entropy_and_kept_by_mse_where_clipping_costs_more() -> None:
    values = np.append(np.abs(np.random.default_rng(3).normal(0, 1, 50_000)), 50.0)
    assert 2.5 < choose_range(observed(values), "entropy", 99)[1] < 12
    assert choose_range(observed(values), "mse", 99)[1] > 45
