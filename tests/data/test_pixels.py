from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from toolkit.artifacts import Normalization, Split
from toolkit.data.images import ArrayImages
from toolkit.data.pixels import IMAGES, PixelStatistics, differences, statistics_in


def images(count: int, seed: int = 0, channels: int = 3, change: Any = lambda pixels: pixels) -> Split:
    """Noise around a level of its own in every image, with a black border."""
    rng = np.random.default_rng(seed)
    array = rng.normal(rng.normal(120, 20, (count, channels, 1, 1)), 40, (count, channels, 8, 8))
    array[..., 0] = 0
    pixels = np.clip(change(array), 0, 255).astype(np.uint8)
    return Split(ArrayImages("noise", ("a",), pixels, np.zeros(count, np.int64)), np.arange(count, dtype=np.int64))


def test_statistics_are_those_of_numpy() -> None:
    split = images(300)
    pixels = split.images.pixels(split.indices) / 255
    found = PixelStatistics.of(split)
    assert found.images == 300
    assert np.allclose(found.mean, pixels.mean((0, 2, 3)))
    assert np.allclose(found.std, pixels.std((0, 2, 3)), rtol=1e-5)
    assert np.allclose(found.mean_error, pixels.mean((2, 3)).std(0) / np.sqrt(300), rtol=1e-5)
    assert found.extremes == pytest.approx(np.isin(pixels, (0, 1)).mean())


def test_large_sets_are_looked_at_evenly() -> None:
    """The first half is dark, the second bright: an even choice sees both."""
    split = images(
        4 * IMAGES, change=lambda p: p * np.where(np.arange(len(p)) < len(p) // 2, 0.2, 1)[:, None, None, None]
    )
    pixels = split.images.pixels(split.indices) / 255
    found = PixelStatistics.of(split)
    assert found.images == IMAGES
    assert np.allclose(found.mean, pixels.mean((0, 2, 3)), atol=0.01)


@pytest.mark.parametrize("count", [2, 10, 100])
def test_images_of_one_kind_raise_no_doubt(count: int) -> None:
    trained_on = PixelStatistics.of(images(400))
    for seed in range(1, 40):
        assert not differences(PixelStatistics.of(images(count, seed)), trained_on)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pixels: pixels + 60, "channel 1: mean 0.6"),
        (lambda pixels: (pixels - 120) / 3 + 120, "channel 0: standard deviation 0.0"),
        (lambda pixels: np.where(pixels > 120, 255, 0), "black or white pixels 100.0% against"),
        (lambda pixels: 255 - pixels, "channel 2: mean"),
        (lambda pixels: pixels / 255, "mean 0.00"),
    ],
)
def test_other_images_are_told_with_the_numbers(change: Any, said: str) -> None:
    trained_on = PixelStatistics.of(images(400))
    found = differences(PixelStatistics.of(images(60, 1, change=change)), trained_on)
    assert said in "; ".join(found)


def test_another_number_of_channels_is_told() -> None:
    grey, colour = (PixelStatistics.of(images(20, channels=count)) for count in (1, 3))
    assert differences(grey, colour) == ("1 channel(s) against 3",)


def test_statistics_travel_in_metadata() -> None:
    found = PixelStatistics.of(images(30))
    read = statistics_in(found.as_metadata() | {"normalization": "not looked at"})
    assert read is not None and read.images == 30
    assert not differences(read, found) and np.allclose(read.std, found.std, atol=1e-5)


def test_a_normalisation_tells_of_the_images_unless_it_is_a_convention() -> None:
    known = statistics_in({"normalization": '{"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2], "inside": true}'})
    assert known is not None
    assert known == PixelStatistics.of_normalization(Normalization((0.4,) * 3, (0.2,) * 3))
    assert not differences(PixelStatistics.of(images(200)), known)
    assert differences(PixelStatistics.of(images(200, change=lambda pixels: pixels + 80)), known)
    assert statistics_in({"normalization": '{"mean": [0.5], "std": [0.5], "inside": true}'}) is None
    assert statistics_in({}) is None
