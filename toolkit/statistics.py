"""Tests between two graphs that were scored on the same images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Mcnemar:
    """Images on which exactly one of two graphs is right, and how likely so lopsided a split is by chance."""

    only_first: int
    only_second: int
    p_value: float
    """Two-sided and exact, in (0, 1]: of the hypothesis that both graphs are right equally often."""

    def as_dict(self) -> dict[str, float | int]:
        return {"only_first": self.only_first, "only_second": self.only_second, "p_value": self.p_value}


def mcnemar(first: Tensor, second: Tensor) -> Mcnemar:
    """McNemar's exact test of two graphs on the same images (McNemar 1947).

    The images on which both are right, or both wrong, say nothing of the difference; the others are tosses of a coin
    that is fair if the graphs are equally good.

    Args:
        first: bool [n], which images the first graph classifies rightly.
        second: bool [n], the same of the second, image by image.

    Raises:
        ValueError: the two are not flags of the same images.
    """
    if first.shape != second.shape or first.dtype.is_floating_point or second.dtype.is_floating_point:
        raise ValueError(
            f"no flags of the same images: {first.dtype} {list(first.shape)}, {second.dtype} {list(second.shape)}"
        )
    first, second = first.bool().cpu(), second.bool().cpu()
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return Mcnemar(only_first, only_second, _two_sided(min(only_first, only_second), only_first + only_second))


def _two_sided(rarer: int, tosses: int) -> float:
    """Chance that a fair coin splits `tosses` at least as lopsidedly as `rarer` to the rest; in exact integers."""
    tail = term = 1
    for heads in range(1, rarer + 1):
        term = term * (tosses - heads + 1) // heads
        tail += term
    return min(1.0, 2 * tail / (1 << tosses))  # both tails weigh the same; an even split stands in both, hence min
