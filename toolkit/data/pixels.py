"""What the pixels of an image set are like, and whether another set looks the same.

Calibration images set the ranges of all activations: images of another kind, or brought into another form, give an
integer graph that clips or wastes its levels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from toolkit.artifacts import Normalization, Split
from toolkit.metadata import metadata_value

IMAGES, BATCH = 500, 100
"""So many images, evenly spread over a set, stand for it; read so many at a time."""
METADATA = "pixel_statistics"
"""Entry of our ONNX files: `PixelStatistics` of the images that the network was trained on."""
MEAN_SHIFT, STD_RATIO, EXTREME_SHIFT = 0.25, 1.25, 0.1
"""Differences that count: of a mean, in standard deviations; of a standard deviation, as a factor; of a share."""
ERRORS, FEWEST = 4.0, 10
"""Standard errors that a difference must exceed besides, and images that it takes to know these."""
CONVENTIONS = (0.0, 0.5)
"""Means of normalisations that only shift the range of pixels, and tell nothing of the images."""


@dataclass(frozen=True)
class PixelStatistics:
    """Of pixels in [0, 1], per channel; errors are standard errors over images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean_error: tuple[float, ...]
    std_error: tuple[float, ...]
    extremes: float | None
    """Share of pixels that are 0 or 1; None: not known."""
    extremes_error: float
    images: int

    @classmethod
    def of(cls, split: Split) -> PixelStatistics:
        """Look at images evenly spread over a split, which is not empty."""
        chosen = split.indices[np.unique(np.linspace(0, len(split) - 1, min(IMAGES, len(split))).astype(np.int64))]
        means, squares, extremes = [], [], []
        for start in range(0, len(chosen), BATCH):
            pixels = split.images.pixels(chosen[start : start + BATCH])
            flat = pixels.reshape(*pixels.shape[:2], -1).astype(np.float32) / 255
            means.append(flat.mean(2, dtype=np.float64))
            squares.append((flat**2).mean(2, dtype=np.float64))
            extremes.append(((pixels == 0) | (pixels == 255)).reshape(len(pixels), -1).mean(1))
        mean, square, ends = np.concatenate(means), np.concatenate(squares), np.concatenate(extremes)
        own = np.sqrt(np.maximum(square - mean**2, 0))
        std = np.sqrt(np.maximum(square.mean(0) - mean.mean(0) ** 2, 0))
        root = math.sqrt(len(chosen))
        return cls(
            tuple(map(float, mean.mean(0))),
            tuple(map(float, std)),
            tuple(map(float, mean.std(0) / root)),
            tuple(map(float, own.std(0) / root)),
            float(ends.mean()),
            float(ends.std()) / root,
            len(chosen),
        )

    @classmethod
    def of_normalization(cls, found: Normalization) -> PixelStatistics | None:
        """What a normalisation tells of the images; None: it is a mere convention."""
        if set(found.mean) <= set(CONVENTIONS):
            return None
        none = (0.0,) * len(found.mean)
        return cls(tuple(found.mean), tuple(found.std), none, none, None, 0.0, 0)

    def as_metadata(self) -> dict[str, str]:
        """The entry of an ONNX file."""
        return {METADATA: json.dumps({key: _rounded(value) for key, value in asdict(self).items()})}


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [round(part, 6) for part in value]
    return round(value, 6) if isinstance(value, float) else value


def statistics_in(metadata: Mapping[str, str]) -> PixelStatistics | None:
    """What an ONNX file tells of the images that its network was trained on; None: nothing."""
    if METADATA in metadata:
        return metadata_value(metadata, METADATA, _statistics)
    if "normalization" not in metadata:
        return None
    return PixelStatistics.of_normalization(metadata_value(metadata, "normalization", normalization_of))


def _statistics(values: Mapping[str, Any]) -> PixelStatistics:
    held: dict[str, Any] = {key: tuple(map(float, v)) if isinstance(v, list) else v for key, v in values.items()}
    return PixelStatistics(**held)


def normalization_of(entry: Mapping[str, Any]) -> Normalization:
    """The normalisation in an ONNX file's entry."""
    return Normalization(tuple(map(float, entry["mean"])), tuple(map(float, entry["std"])))


def differences(found: PixelStatistics, wanted: PixelStatistics) -> tuple[str, ...]:
    """In what one set does not look like another, with the numbers; empty: it does."""
    if len(found.mean) != len(wanted.mean):
        return (f"{len(found.mean)} channel(s) against {len(wanted.mean)}",)
    if any(0 < one.images < FEWEST for one in (found, wanted)):
        return ()
    texts = []
    for channel in range(len(found.mean)):
        where = f"channel {channel}: " if len(found.mean) > 1 else ""
        mean, std = (found.mean[channel], wanted.mean[channel]), (found.std[channel], wanted.std[channel])
        noise = ERRORS * math.hypot(found.mean_error[channel], wanted.mean_error[channel])
        if abs(mean[0] - mean[1]) > max(MEAN_SHIFT * std[1], noise):
            texts.append(f"{where}mean {mean[0]:.3f} against {mean[1]:.3f}")
        noise = ERRORS * math.hypot(found.std_error[channel], wanted.std_error[channel])
        far = std[0] > STD_RATIO * std[1] or std[0] * STD_RATIO < std[1]
        if far and abs(std[0] - std[1]) > noise:
            texts.append(f"{where}standard deviation {std[0]:.3f} against {std[1]:.3f}")
    if found.extremes is not None and wanted.extremes is not None:
        noise = ERRORS * math.hypot(found.extremes_error, wanted.extremes_error)
        if abs(found.extremes - wanted.extremes) > max(EXTREME_SHIFT, noise):
            texts.append(f"black or white pixels {found.extremes:.1%} against {wanted.extremes:.1%}")
    return tuple(texts)
