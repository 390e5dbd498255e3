from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.evaluators import timing
from toolkit.evaluators.timing import foreign_load, ratio_interval, time_block

Array = npt.NDArray[np.float64]


def noisy(generator: np.random.Generator, rounds: int, scale: float = 1.0) -> tuple[Array, Array]:
    """Times of two files under one drifting machine; the first takes `scale` times as long."""
    drift = np.exp(np.cumsum(generator.normal(0, 0.1, rounds)))
    first, second = (drift * generator.lognormal(0, 0.05, rounds) for _ in range(2))
    return scale * first, second


def test_identical_files_have_a_ratio_of_one_inside_the_interval() -> None:
    ratio = ratio_interval(*noisy(np.random.default_rng(1), 30))
    assert ratio.low < 1 < ratio.high


@pytest.mark.parametrize("scale", [2.0, 0.25])
def test_twice_the_work_gives_twice_the_time(scale: float) -> None:
    ratio = ratio_interval(*noisy(np.random.default_rng(2), 30, scale))
    assert ratio.value == pytest.approx(scale, rel=0.05)
    assert ratio.low <= scale <= ratio.high
    assert ratio.high - ratio.low < 0.15 * scale


@pytest.mark.parametrize("rounds", [6, 30])
def test_interval_covers_the_truth_about_as_often_as_it_says(rounds: int) -> None:
    generator = np.random.default_rng(3)
    intervals = [ratio_interval(*noisy(generator, rounds, 1.5), seed=index) for index in range(300)]
    covered = np.mean([interval.low <= 1.5 <= interval.high for interval in intervals])
    assert 0.90 <= covered <= 0.99


def test_pairing_by_round_removes_the_machines_drift() -> None:
    slower, base = noisy(np.random.default_rng(4), 200, 1.02)
    shuffled = np.random.default_rng(5).permutation(base)
    paired, unpaired = ratio_interval(slower, base), ratio_interval(slower, shuffled)
    assert paired.high - paired.low < (unpaired.high - unpaired.low) / 3


def test_exact_ratios_have_an_interval_without_width() -> None:
    base = np.linspace(1, 2, 7)
    ratio = ratio_interval(3 * base, base)
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((3, 3, 3))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=12))
def test_interval_lies_around_the_median_and_within_the_samples(pairs: list[tuple[float, float]]) -> None:
    times, base = (np.array(side) for side in zip(*pairs, strict=True))
    ratio = ratio_interval(times, base)
    assert ratio.value == pytest.approx(float(np.median(times / base)))
    least, most = (times / base).min(), (times / base).max()
    assert least <= ratio.low <= ratio.value <= ratio.high <= most


@pytest.mark.parametrize(
    ("times", "base"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0]), ([np.nan], [1.0]), ([1.0], [np.inf])]
)
def test_times_that_are_none_are_refused(times: list[float], base: list[float]) -> None:
    with pytest.raises(ValueError, match=r"paired|positive"):
        ratio_interval(np.array(times), np.array(base))


class Clock:
    """A clock that calls move forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, 0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def call(self, duration: float) -> None:
        self.now += duration
        self.calls += 1


def test_fast_calls_are_repeated_for_the_time_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    times = time_block(lambda: clock.call(0.001))
    assert len(times) == pytest.approx(timing.BLOCK_S / 0.001, abs=1)
    assert times == pytest.approx(0.001)
    assert clock.calls > len(times) + 1  # the warm-up is not among them


def test_slow_calls_are_warmed_up_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert time_block(lambda: clock.call(2.0)) == pytest.approx([2.0])
    assert clock.calls == 2


def test_very_fast_calls_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    assert len(time_block(lambda: clock.call(1e-9))) == timing.BLOCK_CALLS[1]


def test_foreign_load_is_what_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    class Times:
        def __init__(self, user: float, idle: float) -> None:
            self.user, self.idle, self.system = user, idle, 0.0

        def _asdict(self) -> dict[str, float]:
            return {"user": self.user, "idle": self.idle}

    elsewhere = Times(1000, 0)
    machine = iter([[Times(50, 0), Times(50, 0), elsewhere], [Times(58, 2), Times(54, 6), Times(1010, 0)]])
    own = iter([Times(50, 0), Times(57, 0)])
    monkeypatch.setattr(timing, "own_cpus", lambda: [0, 1])
    clock = Clock(monkeypatch)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: next(machine) if percpu else None)
    monkeypatch.setattr(psutil.Process, "cpu_times", lambda _self: next(own))
    with foreign_load() as load:
        clock.now += 10
    assert load() == pytest.approx((12 - 7) / 20)
