"""Alarms: what makes a robustness figure suspect. They stand beside the figure, never in a footnote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.artifacts import Proportion

INTEGER_ABOVE_FLOAT = 0.003
"""The integer graph may look more robust than its float twin by at most this much."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """One reason to doubt a figure."""

    name: str
    message: str
    value: float
    limit: float


def integer_above_float(robust: Mapping[str, Proportion]) -> tuple[Alarm, ...]:
    """Rounding and clipping hide gradients but do not make a network robust: a gain over the float twin is an alarm.

    Args:
        robust: worst-case robust accuracy with the keys `fp32` and `deployed`.
    """
    gain = robust["deployed"].value - robust["fp32"].value
    if gain <= INTEGER_ABOVE_FLOAT:
        return ()
    message = (
        f"the integer graph looks {100 * gain:.2f} points more robust than its float twin under attacks made on the "
        "float network: the attack transfers badly or the input quantiser clips it; do not rely on the gain"
    )
    return (Alarm("integer_above_float", message, gain, INTEGER_ABOVE_FLOAT),)
