from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from toolkit.artifacts import Predictor
from toolkit.errors import ToolkitError
from toolkit.exporters.parity import check_parity, measure_parity
from toolkit.exporters.session import OnnxPredictor

from .conftest import Trained
from .small import pictures


class Given:
    """Logits that are the first three pixels, changed by a function of them."""

    def __init__(self, change: float = 0.0, *, wrong_at: int | None = None, scale: float = 1.0) -> None:
        self.change, self.wrong_at, self.scale = change, wrong_at, scale

    def predict(self, images: Tensor) -> Tensor:
        logits = images.flatten(1)[:, :3] * self.scale
        if self.wrong_at is not None and len(images) != self.wrong_at:
            return logits
        return logits + self.change * torch.tensor([1.0, 0.0, 0.0])


SPLIT = pictures(70, (1, 4, 4))


def test_equal_predictors_agree_wholly() -> None:
    parity = measure_parity(Given(), Given(), SPLIT)
    assert [batch.batch_size for batch in parity.batches] == [1, 7, 64]
    assert parity.relative == 0
    assert (parity.agreement.correct, parity.agreement.total) == (70, 70)
    check_parity(parity)


def test_differences_are_relative_to_the_spread_of_the_logits() -> None:
    plain = measure_parity(Given(), Given(0.25), SPLIT, batch_sizes=(7,))
    wanted = SPLIT.take(SPLIT.indices).images.flatten(1)[:, :3]
    assert math.isclose(plain.batches[0].max_difference, 0.25, rel_tol=1e-5)
    assert math.isclose(plain.relative, 0.25 / float(wanted.std()), rel_tol=1e-5)
    flipped = ((wanted + torch.tensor([0.25, 0, 0])).argmax(1) != wanted.argmax(1)).sum()
    assert plain.agreement.total - plain.agreement.correct == int(flipped)
    with pytest.raises(ToolkitError, match="does not compute"):
        check_parity(plain)


def test_a_difference_at_one_batch_size_only_is_found() -> None:
    parity = measure_parity(Given(), Given(0.25, wrong_at=7), SPLIT)
    assert [batch.relative > 0 for batch in parity.batches] == [False, True, False]
    with pytest.raises(ToolkitError, match="does not compute") as caught:
        check_parity(parity)
    assert "at batch 7" in caught.value.found


def test_flat_logits_prove_nothing() -> None:
    flat: Predictor = Given(scale=0.0)
    with pytest.raises(ToolkitError, match="nothing can be compared"):
        check_parity(measure_parity(flat, flat, SPLIT))


def test_logits_that_are_no_numbers_fail() -> None:
    with pytest.raises(ToolkitError, match="does not compute"):
        check_parity(measure_parity(Given(), Given(math.nan), SPLIT))


def test_the_float_twin_of_a_trained_network_passes_far_below_the_tolerance(trained: Trained) -> None:
    parity = measure_parity(trained.model, OnnxPredictor(trained.twin.path), trained.evaluation)
    check_parity(parity)
    assert parity.spread > 0.5
    assert parity.relative < 2e-5
    assert parity.agreement.total == 128
    assert parity.as_dict()["batches"][0]["agreement"]["total"] == 128
