"""Learning-rate schedules: the rate as a share of its peak, by the share of training done."""

from __future__ import annotations

from collections.abc import Callable, Mapping

WARM_UP = 0.2
"""Share of training in which the one-cycle rate rises."""
STEP_EPOCH = 4
"""Epochs after which the paper's rate falls to a tenth."""


def one_cycle(step: int, total: int, _steps_per_epoch: int) -> float:
    """Linear from 0 to 1 over the warm-up, then linear to 0 (Smith 2018, in its straight form)."""
    done = (step + 1) / (total + 1)
    return done / WARM_UP if done < WARM_UP else (1 - done) / (1 - WARM_UP)


def stepped(step: int, _total: int, steps_per_epoch: int) -> float:
    """The paper's: a tenth after the fourth epoch."""
    return 1.0 if step < STEP_EPOCH * steps_per_epoch else 0.1


def constant(_step: int, _total: int, _steps_per_epoch: int) -> float:
    """The same rate throughout."""
    return 1.0


SCHEDULES: Mapping[str, Callable[[int, int, int], float]] = {
    "one-cycle": one_cycle,
    "stepped": stepped,
    "constant": constant,
}
