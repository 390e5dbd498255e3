from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.toys import halves
from toolkit import artifacts
from toolkit.artifacts import Proportion
from toolkit.evaluators.accuracy import correct, measure_accuracy


class Brighter:
    """Class 1 where the right half is the brighter one: right on all of `halves`."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def predict(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        left, right = images[..., : images.shape[-1] // 2], images[..., images.shape[-1] // 2 :]
        return torch.stack([left.mean(dim=(1, 2, 3)), right.mean(dim=(1, 2, 3))], dim=1)


class Turned(Brighter):
    def predict(self, images: Tensor) -> Tensor:
        return super().predict(images).flip(1)


def test_every_image_counts_once_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    split = halves(10)
    for size in (1, 3, 10, 100):
        monkeypatch.setattr(artifacts, "evaluation_batch", lambda _shape, size=size: size)
        predictor = Brighter()
        assert measure_accuracy(predictor, split) == Proportion(10, 10)
        assert sum(predictor.sizes) == 10 and max(predictor.sizes) <= size
        assert measure_accuracy(Turned(), split) == Proportion(0, 10)


def test_logits_that_are_no_numbers_are_wrong() -> None:
    class Broken:
        def predict(self, images: Tensor) -> Tensor:
            logits = torch.tensor([1.0, 0.0]).repeat(len(images), 1)
            logits[0, 1], logits[1, 0], logits[2, 1] = torch.nan, torch.inf, -torch.inf
            return logits

    flags = correct(Broken(), torch.zeros(4, 1, 2, 2), torch.zeros(4, dtype=torch.int64))
    assert flags.tolist() == [False, False, True, True], "another class may be impossible"
