"""Timing of calls and statistics of paired times, without knowledge of what is timed."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

BLOCK_S = 0.03
"""Time for the calls of one block: enough for a steady median of fast networks, one call of slow ones."""
BLOCK_CALLS = (3, 200)
SLOW_CALL_S = 0.1
"""Calls longer than this are steady by themselves: one to warm up and one to measure."""
RESAMPLES = 2000


BUSY = 0.05
"""Share of CPU time taken by others from which times are wrong (and, with waiting threads preempted, ratios too)."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


def ratio_interval(times: FloatArray, baseline: FloatArray, seed: int = 0) -> Interval:
    """The median of paired ratios and its percentile bootstrap interval (Efron 1979), resampling rounds.

    Args:
        times: one time per round, positive, [rounds].
        baseline: the baseline's time in the same rounds, [rounds].
        seed: of the resampling.

    Raises:
        ValueError: the two are not paired, or a time is not positive and finite.
    """
    if times.shape != baseline.shape or times.ndim != 1 or len(times) == 0:
        raise ValueError(f"times are not paired by round: shapes {times.shape} and {baseline.shape}")
    if not all(np.isfinite(side).all() and (side > 0).all() for side in (times, baseline)):
        raise ValueError("times must be positive and finite")
    ratios = times / baseline
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[chosen], axis=1), (0.025, 0.975))
    return Interval(float(np.median(ratios)), float(low), float(high))


def time_block(call: Callable[[], object]) -> FloatArray:
    """Warm up, then time calls for about `BLOCK_S`; seconds of each."""
    clock = time.perf_counter
    start = clock()
    call()
    first = clock() - start
    if first > SLOW_CALL_S:
        count = 1
    else:
        start = clock()
        call()
        estimate = max(clock() - start, 1e-7)
        count = int(np.clip(BLOCK_S / estimate, *BLOCK_CALLS))
        for _ in range(count // 4):
            call()
    times = np.empty(count)
    for index in range(count):
        start = clock()
        call()
        times[index] = clock() - start
    return times


@contextmanager
def foreign_load() -> Iterator[Callable[[], float]]:
    """Watch the CPU; after the block, the function given says which share of its time went to other processes."""
    import psutil

    result = 0.0
    cpus = own_cpus()

    def reading() -> tuple[float, float]:
        idle = ("idle", "iowait", "guest", "guest_nice")  # user and nice hold the guests' time already
        every = psutil.cpu_times(percpu=True)
        used = [every[cpu]._asdict() for cpu in cpus if cpu < len(every)]
        own = psutil.Process().cpu_times()
        busy = sum(value for one in used for name, value in one.items() if name not in idle)
        return busy, own.user + own.system

    (busy, own), start = reading(), time.perf_counter()
    yield lambda: result
    busy_after, own_after = reading()
    available = (time.perf_counter() - start) * len(cpus)
    result = float(np.clip((busy_after - busy - (own_after - own)) / available, 0, 1))


def own_cpus() -> list[int]:
    """The CPUs that this process may run on; load on the others does not disturb it."""
    import psutil

    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(psutil.cpu_count() or 1))


@contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection inside a timed call."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
