"""Alarms: what makes a robustness figure suspect. They stand beside the figure, never in a footnote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.artifacts import Proportion
from toolkit.exporters.end_to_end import EndToEndComparison

INTEGER_ABOVE_FLOAT = 0.003
"""The integer graph may look more robust than its float twin by at most this much."""


END_TO_END_PROBABILITY = 0.1
"""By so much at most may a probability of the end-to-end graph differ where no image decoder is involved."""


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


def end_to_end_differs(found: EndToEndComparison | None) -> tuple[Alarm, ...]:
    """The preprocessing inside model.e2e.onnx must be that of torchvision, on which all figures rest."""
    if found is None or found.lossless_difference <= END_TO_END_PROBABILITY:
        return ()
    message = (
        f"model.e2e.onnx gives probabilities up to {found.lossless_difference:.3f} away from torchvision's "
        f"preprocessing before the same network (same label {found.lossless_agreement}); "
        "the figures hold for model.onnx alone"
    )
    return (Alarm("end_to_end_differs", message, found.lossless_difference, END_TO_END_PROBABILITY),)
