from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.toys import halves
from toolkit.artifacts import Predictor
from toolkit.errors import ToolkitError
from toolkit.evaluators.scoring import TargetName
from toolkit.input_form import refuse_wrong_input

SPLIT = halves(120)


class Wants:
    """Answers rightly where its images come in the form `restore` undoes, and always `left` otherwise."""

    def __init__(self, fits: Callable[[Tensor], bool]) -> None:
        self._fits = fits

    def predict(self, images: Tensor) -> Tensor:
        left, right = images[..., :4].mean(dim=(1, 2, 3)), images[..., 4:].mean(dim=(1, 2, 3))
        logits = torch.stack([left, right], dim=1)
        return logits if self._fits(images) else torch.tensor([[1.0, 0.0]]).repeat(len(images), 1)


class Guesses:
    """Answers by the images' noise, in any form."""

    def predict(self, images: Tensor) -> Tensor:
        return torch.stack([images[:, 0, 0, 0] * 7919 % 1, images[:, 0, 7, 7] * 7919 % 1], dim=1)


def check(predictor: Predictor, name: TargetName = "deployed") -> None:
    refuse_wrong_input({name: predictor}, SPLIT)


@pytest.mark.parametrize(
    ("fits", "form", "advice"),
    [
        (lambda images: bool(images.max() > 10), "pixels in [0, 255]", "--mean 0 --std 1/255"),
        (lambda images: bool(-1.001 < images.min() < 0 and images.max() <= 1), "pixels in [-1, 1]", "--std 0.5"),
        (lambda images: bool(images.min() < 0 and 1 < images.max() < 10), "standardised by channel", "--mean 0."),
    ],
)
def test_a_network_that_wants_another_form(fits: Callable[[Tensor], bool], form: str, advice: str) -> None:
    with pytest.raises(ToolkitError, match="pixels in") as caught:
        check(Wants(fits))
    assert form in caught.value.found and advice in caught.value.fix


def test_the_statistics_in_the_advice_are_those_of_the_images() -> None:
    with pytest.raises(ToolkitError) as caught:
        check(Wants(lambda images: bool(images.min() < 0 and 1 < images.max() < 10)))
    pixels = SPLIT.take(SPLIT.indices).images
    assert f"--mean {pixels.mean():.4f} --std {pixels.std():.4f}" in caught.value.fix


def test_negative_images_are_no_matter_of_mean_and_deviation() -> None:
    class Negative:
        def predict(self, images: Tensor) -> Tensor:
            halves_of = [images[..., :4].mean(dim=(1, 2, 3)), images[..., 4:].mean(dim=(1, 2, 3))]
            return -torch.stack(halves_of, dim=1)

    with pytest.raises(ToolkitError) as caught:
        check(Negative(), "torch")
    assert "negative images" in caught.value.found and "--mean" not in caught.value.fix


def test_a_network_that_is_right_or_guesses_is_left_alone() -> None:
    check(Wants(lambda images: bool(images.min() >= 0 and images.max() <= 1)))
    check(Wants(lambda _images: False))
    check(Guesses())
