"""Evaluations that can be counted by hand: images of one grey value, and networks that look at the mean pixel alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tests.toys import linear_model
from toolkit.artifacts import Int64Array, Normalization, Predictor, Split, TorchModel, UInt8Array
from toolkit.attacks.ensemble import Pass
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.data.images import ArrayImages
from toolkit.evaluators.evaluation import Clock, Conditions, Evaluation
from toolkit.evaluators.image_files import WRITABLE_CHANNELS, Gallery
from toolkit.evaluators.journal import Journal
from toolkit.evaluators.scoring import Judges, Ledger, TargetName, clean_flags

SIDE = 4
EPS = 0.1
PLAIN = Normalization((0.0,), (1.0,))
Norm = Literal["linf", "l2", "l1"]


def flat_images(values: Sequence[int], labels: Sequence[int] | None = None) -> Split:
    """Images of one grey value each; label 1 means brighter than the middle."""
    pixels: UInt8Array = np.repeat(np.array(values, np.uint8), SIDE * SIDE).reshape(-1, 1, SIDE, SIDE)
    truth: Int64Array = np.array(labels if labels is not None else [value > 127 for value in values], np.int64)
    return Split(ArrayImages("flat", ("dark", "bright"), pixels, truth), np.arange(len(values), dtype=np.int64))


def noise_images(count: int, model: Predictor, *, channels: int = 1, classes: int = 2, seed: int = 0) -> Split:
    """Random images with the labels that `model` gives them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, channels, SIDE, SIDE), dtype=np.uint8)
    labels = model.predict(torch.from_numpy(pixels).float() / 255).argmax(dim=1).numpy()
    return Split(ArrayImages("noise", tuple("abcd"[:classes]), pixels, labels), np.arange(count, dtype=np.int64))


def threshold(at: float = 0.5, slope: float = 1.0) -> TorchModel:
    """Bright if the mean pixel is above `at`; PGD on it moves every pixel straight towards the threshold."""
    weight = torch.stack([-torch.ones(SIDE * SIDE), torch.ones(SIDE * SIDE)]) * slope / SIDE**2
    return linear_model(weight, (1, SIDE, SIDE), Normalization((at,), (1.0,)))


def random_model(seed: int = 1, *, channels: int = 1) -> TorchModel:
    """A linear network with random weights."""
    weight = torch.randn(2, channels * SIDE * SIDE, generator=torch.Generator().manual_seed(seed))
    return linear_model(weight, (channels, SIDE, SIDE), Normalization((0.5,) * channels, (0.5,) * channels))


class By:
    """A predictor whose answer is a function of the mean pixel; it counts the images that it was shown."""

    def __init__(self, bright: Callable[[Tensor], Tensor]) -> None:
        self.bright = bright
        self.calls: list[int] = []

    def predict(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        return torch.nn.functional.one_hot(self.bright(images.mean(dim=(1, 2, 3))).long(), 2).float()


def above(at: float) -> By:
    """Bright above `at`."""
    return By(lambda mean: mean > at)


def a_plan(
    steps: int = 5,
    *,
    norm: Norm = "linf",
    eps: float = EPS,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = False,
    clip: bool = True,
) -> PgdPlan:
    threat = ThreatModel(norm, eps, "pixels" if clip else "normalised", clip)
    return PgdPlan("pixel", threat, steps, step_size or eps, random_start, restarts)


def conditions(plan: PgdPlan | None = None, *passes: Pass, seed: int = 3, **others: Any) -> Conditions:
    """In float32, whatever the machine."""
    return Conditions(plan or a_plan(), PLAIN, seed, passes, "float32", **others)


def an_evaluation(
    targets: Mapping[TargetName, Predictor],
    split: Split,
    how: Conditions | None = None,
    *,
    journal: Journal | None = None,
    clock: Clock | None = None,
    gallery: Path | None = None,
) -> Evaluation:
    """One under way, with its clean images scored."""
    how = how or conditions()
    judges = Judges(targets, how.plan.threat, how.normalization, Gallery(gallery))
    clean = clean_flags(judges, split, lambda _: None)
    ledger = Ledger(clean, judges, files=split.images.shape[0] in WRITABLE_CHANNELS, keep_near=how.keep_near)
    return Evaluation(judges, ledger, split, how, journal or Journal(), clock or Clock())


class Countdown(Clock):
    """Expires when it was asked `left` times."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    @property
    def expired(self) -> bool:
        self.left -= 1
        return self.left < 0
