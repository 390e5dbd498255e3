from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from toolkit.attacks.losses import cross_entropy, dlr, margin, ranked_targets, targeted_dlr

LOGITS = torch.tensor([[4.0, 1.0, 3.0, 0.0], [4.0, 1.0, 3.0, 0.0]])
LABELS = torch.tensor([0, 2])


def random_logits(seed: int, classes: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, classes, generator=generator) * 3, torch.randint(0, classes, (8,), generator=generator)


def test_the_losses_are_those_of_the_papers_by_hand() -> None:
    assert margin(LOGITS, LABELS).tolist() == [-1.0, 1.0]
    # of the leading three logits 4, 3, 1: the spread is 3; of the leading four: 4 - (1 + 0) / 2
    assert dlr(LOGITS, LABELS).tolist() == pytest.approx([-1 / 3, 1 / 3])
    towards = targeted_dlr(LOGITS, LABELS, torch.tensor([1, 0]))
    assert towards.tolist() == pytest.approx([-3 / 3.5, 1 / 3.5])
    assert cross_entropy(LOGITS, LABELS).tolist() == pytest.approx(
        (torch.logsumexp(LOGITS, 1) - torch.tensor([4.0, 3.0])).tolist()
    )


@given(st.integers(0, 10_000))
def test_margin_and_dlr_are_positive_exactly_where_the_image_is_misclassified(seed: int) -> None:
    logits, labels = random_logits(seed)
    wrong = logits.argmax(dim=1) != labels
    assert torch.equal(margin(logits, labels) > 0, wrong) and torch.equal(dlr(logits, labels) > 0, wrong)


@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-10, 10))
def test_dlr_does_not_change_with_scale_and_shift_of_the_logits(seed: int, scale: float, shift: float) -> None:
    """In float64: where the leading logits lie close together, rounding in float32 alone changes it."""
    drawn, labels = random_logits(seed)
    logits = drawn.double()
    targets = ranked_targets(logits, labels)[:, 0]
    other = logits * scale + shift
    torch.testing.assert_close(dlr(logits, labels), dlr(other, labels), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        targeted_dlr(logits, labels, targets), targeted_dlr(other, labels, targets), rtol=1e-6, atol=1e-6
    )


@given(st.integers(0, 10_000), st.integers(2, 6))
def test_targets_are_the_other_classes_likeliest_first(seed: int, classes: int) -> None:
    logits, labels = random_logits(seed, classes)
    targets = ranked_targets(logits, labels)
    assert targets.shape == (8, classes - 1) and not bool((targets == labels[:, None]).any())
    ranked = logits.gather(1, targets)
    assert bool((ranked.diff(dim=1) <= 0).all())


def test_a_class_of_minus_infinity_comes_last_and_before_the_true_one() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 2.0], [1.0, -torch.inf, -torch.inf]])
    assert ranked_targets(logits, torch.tensor([2, 0])).tolist() == [[0, 1], [1, 2]]


def test_few_classes_fall_back_to_plain_differences() -> None:
    two, labels = torch.tensor([[2.0, 5.0]]), torch.tensor([0])
    assert dlr(two, labels).tolist() == [3.0] == margin(two, labels).tolist()
    assert targeted_dlr(two, labels, torch.tensor([1])).tolist() == [3.0]
    three = torch.tensor([[2.0, 5.0, 1.0]])
    assert dlr(three, labels).tolist() == pytest.approx([3 / 4])
    assert targeted_dlr(three, labels, torch.tensor([2])).tolist() == [-1.0]
