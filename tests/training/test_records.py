from __future__ import annotations

import math

import pytest

from toolkit.artifacts import Proportion
from toolkit.training.records import EpochRecord


def record(epoch: int, clean: int, robust: int | None, n: int = 100) -> EpochRecord:
    return EpochRecord(epoch, 0.5, Proportion(clean, n), None if robust is None else Proportion(robust, n))


def test_the_score_is_the_sum_and_its_error_that_of_two_shares() -> None:
    both = record(1, 90, 80)
    assert both.score == pytest.approx(1.7)
    assert both.standard_error == pytest.approx(math.sqrt((0.9 * 0.1 + 0.8 * 0.2) / 100))
    assert record(1, 90, None).standard_error == pytest.approx(0.03)


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ([60], 1),
        ([60, 90, 70], 2),  # clearly worse than the best
        ([60, 90, 88], 3),  # validation cannot tell: the later one
        ([60, 90, 86, 88], 4),
        ([90, 88, 86, 84], 2),  # a slow fall is measured from the best
        ([60, 90, 91], 3),
    ],
)
def test_the_last_epoch_is_kept_that_is_not_clearly_worse_than_the_best(scores: list[int], kept: int) -> None:
    epochs = [record(number, score, None) for number, score in enumerate(scores, start=1)]
    chosen = [epoch.epoch for position, epoch in enumerate(epochs) if epoch.is_kept_after(epochs[:position])]
    assert chosen[-1] == kept


@pytest.mark.parametrize("robust", [None, 70])
def test_a_record_comes_back_from_plain_data(robust: int | None) -> None:
    assert EpochRecord.from_list(record(3, 90, robust).to_list()) == record(3, 90, robust)
