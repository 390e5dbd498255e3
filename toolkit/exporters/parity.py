"""Parity: does an exported file compute what the network computes, at every batch size?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.artifacts import Predictor, Proportion, Split
from toolkit.errors import ToolkitError

BATCH_SIZES = (1, 7, 64)
IMAGES = 128
TOLERANCE = 1e-3
"""Largest logit difference, relative to the logits' standard deviation, that a float twin may show.

Float32 sums in another order differ by 1e-6 to 1e-5 (measured on ten networks); a wrong epsilon, padding or layer shows
at 1e-2 and above. Between the two, 1e-3 leaves room for deep networks and for the reduced precision of GPUs.
"""
LEAST_SPREAD = 1e-6
"""Logits that vary less than this, in standard deviations, agree whatever is broken: random weights prove nothing."""


@dataclass(frozen=True, slots=True)
class BatchParity:
    """Agreement with the reference when images come in batches of one size."""

    batch_size: int
    max_difference: float
    """Largest absolute difference of a logit."""
    relative: float
    """The same over the standard deviation of the reference's logits."""
    agreement: Proportion
    """Share of images with the same label."""


@dataclass(frozen=True, slots=True)
class Parity:
    """Agreement of two predictors on the same images, by batch size."""

    spread: float
    """Standard deviation of the reference's logits."""
    batches: tuple[BatchParity, ...]

    @property
    def relative(self) -> float:
        """The worst relative difference of all batch sizes."""
        return max(batch.relative for batch in self.batches)

    @property
    def agreement(self) -> Proportion:
        """The worst label agreement of all batch sizes."""
        return min((batch.agreement for batch in self.batches), key=lambda share: share.value)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        rows = [
            {
                "batch_size": batch.batch_size,
                "max_difference": batch.max_difference,
                "relative": batch.relative,
                "agreement": batch.agreement.as_dict(),
            }
            for batch in self.batches
        ]
        return {"spread": self.spread, "batches": rows}


def measure_parity(
    reference: Predictor,
    candidate: Predictor,
    split: Split,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    images: int = IMAGES,
) -> Parity:
    """Compare two predictors on the first images of a split, the candidate in batches of every given size.

    Args:
        reference: usually the torch network.
        candidate: usually the exported file.
        split: real images.
        batch_sizes: the last batch of each pass is smaller where the size does not divide the number of images.
        images: how many to use; at most all.
    """
    inputs = split.take(np.arange(min(images, len(split)), dtype=np.int64)).images
    wanted = torch.cat([reference.predict(part) for part in torch.split(inputs, max(batch_sizes))])
    spread = float(wanted.std())
    return Parity(spread, tuple(_compare(candidate, inputs, wanted, spread, size) for size in batch_sizes))


def _compare(candidate: Predictor, inputs: Tensor, wanted: Tensor, spread: float, size: int) -> BatchParity:
    found = torch.cat([candidate.predict(part) for part in torch.split(inputs, size)])
    difference = float((found - wanted).abs().max())
    if not torch.isfinite(found).all():
        difference = float("inf")
    relative = difference / spread if spread > 0 else float("inf")
    return BatchParity(size, difference, relative, Proportion.of(found.argmax(1) == wanted.argmax(1)))


def check_parity(parity: Parity, *, tolerance: float = TOLERANCE) -> None:
    """Refuse a file that does not compute what the network computes.

    Raises:
        ToolkitError: a difference beyond the tolerance, or logits so flat that agreement proves nothing.
    """
    if parity.spread < LEAST_SPREAD:
        raise ToolkitError(
            "the network gives all images the same logits, so that nothing can be compared",
            found=f"the logits' standard deviation is {parity.spread:.1e}",
            fix="train the network first (`toolkit train`): untrained weights prove nothing",
        )
    for batch in parity.batches:
        if not batch.relative <= tolerance:
            raise ToolkitError(
                "the exported file does not compute what the network computes",
                found=f"at batch {batch.batch_size} logits differ by up to {batch.max_difference:.2e}, "
                f"{batch.relative:.1e} of their standard deviation (allowed: {tolerance:.0e}); "
                f"same label for {batch.agreement}",
                fix="look in forward() for what depends on the batch size, on randomness or on training mode",
            )
