"""Clean accuracy of anything that gives logits."""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.artifacts import Predictor, Proportion, Split


def correct(predictor: Predictor, images: Tensor, labels: Tensor) -> Tensor:
    """Which images are classified rightly, bool [n] on the CPU; logits that are not finite count as wrong."""
    return right(predictor.predict(images).cpu(), labels.cpu())


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which logits [n, classes] name the class in labels [n], bool [n]; NaN and infinity do not.

    Another class may be impossible (minus infinity), as behind the logarithm of a Softmax.
    """
    highest = logits.max(dim=1)  # NaN, where there is one
    return highest.indices.eq(labels) & highest.values.isfinite()


def measure_accuracy(predictor: Predictor, split: Split) -> Proportion:
    """Share of the images of `split` that are classified rightly."""
    return Proportion.of(torch.cat([correct(predictor, batch.images, batch.labels) for batch in split.batches()]))
