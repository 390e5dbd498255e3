from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.toys import linear_model
from toolkit.artifacts import Predictor
from toolkit.errors import ToolkitError
from toolkit.evaluators.fidelity import FIDELITY_LIMIT, compare, count_saturated
from toolkit.reports.schema.robustness import FidelityRecord

IMAGES = torch.rand(200, 1, 2, 2, generator=torch.Generator().manual_seed(0))
LINEAR = linear_model(torch.tensor([[4.0, 0, 0, 0], [0, 4, 0, 0]]), (1, 2, 2))


class Shifted:
    """Another predictor, with a constant added to the logits of class 0."""

    def __init__(self, inner: Predictor, by: float = 100.0) -> None:
        self.inner, self.by = inner, by

    def predict(self, images: Tensor) -> Tensor:
        logits = self.inner.predict(images).clone()
        logits[:, 0] += self.by
        return logits


def test_differences_are_the_largest_and_relative_to_the_spread() -> None:
    found = compare(Shifted(LINEAR, 0.25), LINEAR, torch.split(IMAGES, 64), [IMAGES[:10]], nn.Identity())
    assert found.max_difference == pytest.approx(0.25)
    spread = torch.cat([LINEAR.predict(IMAGES), LINEAR.predict(IMAGES[:10])]).std()
    assert found.relative == pytest.approx(0.25 / float(spread))
    same = LINEAR.predict(IMAGES).argmax(1) == Shifted(LINEAR, 0.25).predict(IMAGES).argmax(1)
    assert (found.agreement_clean.correct, found.agreement_clean.total) == (int(same.sum()), 200)
    assert found.agreement_attacked is not None and found.agreement_attacked.total == 10


def test_the_limit_counts_for_clean_and_for_attacked_images() -> None:
    agree = compare(LINEAR, LINEAR, [IMAGES], [], nn.Identity())
    assert agree.valid and agree.agreement_attacked is None and agree.agreement_clean.value >= FIDELITY_LIMIT
    assert not compare(Shifted(LINEAR), LINEAR, [IMAGES], [], nn.Identity()).valid
    plain = IMAGES[LINEAR.predict(IMAGES).argmax(1) == 0]
    assert not compare(Shifted(LINEAR), LINEAR, [plain], [IMAGES], nn.Identity()).valid
    assert agree.as_dict()["valid"] is True and agree.as_dict()["agreement_attacked"] is None


def test_logits_that_are_not_finite_differ_infinitely() -> None:
    assert compare(Shifted(LINEAR, float("nan")), LINEAR, [IMAGES], [], nn.Identity()).max_difference == float("inf")


def test_equal_logits_of_all_images_have_no_spread() -> None:
    flat = linear_model(torch.zeros(2, 4), (1, 2, 2))
    assert compare(flat, flat, [IMAGES], [], nn.Identity()).relative == 0
    assert compare(Shifted(flat), flat, [IMAGES], [], nn.Identity()).relative == float("inf")


def test_a_class_that_is_impossible_on_both_sides_makes_no_difference() -> None:
    never = Shifted(LINEAR, -float("inf"))
    found = compare(never, never, [IMAGES], [], nn.Identity())
    assert (found.max_difference, found.relative, found.valid) == (0, 0, True)
    assert compare(never, LINEAR, [IMAGES], [], nn.Identity()).max_difference == float("inf")


def test_what_is_not_finite_can_be_written_and_read() -> None:
    found = compare(Shifted(LINEAR, float("nan")), LINEAR, [IMAGES], [], nn.Identity())
    record = FidelityRecord(**found.as_dict())
    assert FidelityRecord.model_validate_json(record.model_dump_json()) == record
    assert record.max_difference is None and record.relative is None


def test_no_images_are_refused() -> None:
    with pytest.raises(ToolkitError, match="no images to compare"):
        compare(LINEAR, LINEAR, [], [IMAGES], nn.Identity())


def test_only_a_twin_can_be_watched() -> None:
    with pytest.raises(TypeError, match="only a twin"):
        count_saturated(LINEAR.module, [IMAGES])
