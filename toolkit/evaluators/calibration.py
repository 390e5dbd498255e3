"""Whether attacked images among the calibration images help: both graphs on the same validation images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from toolkit.artifacts import Batch, Predictor, Proportion, Split
from toolkit.attacks.planned import PlannedAttack
from toolkit.evaluators.accuracy import correct
from toolkit.evaluators.saturation_emulation import twin_of_session
from toolkit.evaluators.surrogate import Twin, UnconvertibleGraph, saturation
from toolkit.exporters.engine import QuantizedModel
from toolkit.exporters.session import OnnxPredictor, Provider
from toolkit.progress import task
from toolkit.statistics import Mcnemar, mcnemar

COMPARED_IMAGES = 5000
WATCHED_IMAGES = 512
"""On so many images the clipped activations are counted."""
SIGNIFICANT = 0.05

Verdict = Literal["helps", "hurts", "trades", "no_difference"]


@dataclass(frozen=True)
class CalibrationScore:
    """One of the two graphs."""

    clean: Proportion
    robust: Proportion
    """Share of images right when clean and under the attack."""
    clipped_clean: float | None
    """Share of activations that quantisers clip, mean over the quantised tensors; None: the graph has no twin."""
    clipped_attacked: float | None


@dataclass(frozen=True)
class CalibrationComparison:
    """A graph calibrated with attacked images beside one without, attacked alike, all steps on all images."""

    attack: str
    adversarial: CalibrationScore
    plain: CalibrationScore
    clean_test: Mcnemar
    """First: with attacked images; second: without."""
    robust_test: Mcnemar

    @property
    def verdict(self) -> Verdict:
        return judge(self.clean_test, self.robust_test)


def judge(clean: Mcnemar, robust: Mcnemar) -> Verdict:
    """What two paired tests at the 5 % level say of their first side; `trades`: better in one, worse in the other."""
    signs = {
        (test.only_first > test.only_second) - (test.only_first < test.only_second)
        for test in (clean, robust)
        if test.p_value < SIGNIFICANT
    }
    if signs == {1, -1}:
        return "trades"
    return "helps" if signs == {1} else "hurts" if signs == {-1} else "no_difference"


def compare_calibrations(
    adversarial: QuantizedModel,
    plain: QuantizedModel,
    attack: PlannedAttack,
    split: Split,
    *,
    provider: Provider = "cpu",
) -> CalibrationComparison:
    """Score both graphs on clean and attacked images; the attack is made on the float network, for neither of the two.

    Args:
        adversarial: calibrated with attacked images.
        plain: the same graph calibrated without.
        attack: of the run's plan, restarts included.
        split: validation images, of which at most the first 5,000 are taken; streamed.
        provider: what runs the graphs.
    """
    split = split.first(COMPARED_IMAGES)
    sides = tuple(_Side(found, provider) for found in (adversarial, plain))
    with task("compare calibrations", len(split)) as bar:
        for number, batch in enumerate(split.batches()):
            attacked = [attack.attack(batch, number, restart) for restart in range(attack.plan.restarts)]
            for side in sides:
                side.score(batch, attacked)
            bar.advance(len(batch))
    first, second = (side.flags() for side in sides)
    return CalibrationComparison(
        f"pgd-{attack.plan.steps}",
        sides[0].result(),
        sides[1].result(),
        mcnemar(first[0], second[0]),
        mcnemar(first[1], second[1]),
    )


@dataclass
class _Watch:
    """Shares of clipped activations, weighted by the images of each batch."""

    total: float = 0.0
    images: int = 0

    def add(self, twin: Twin, images: Tensor) -> None:
        shares = saturation(twin, [images])
        self.total += len(images) * sum(shares.values()) / max(1, len(shares))
        self.images += len(images)

    @property
    def share(self) -> float | None:
        return self.total / self.images if self.images else None


@dataclass
class _Tally:
    clean: list[Tensor] = field(default_factory=list)
    robust: list[Tensor] = field(default_factory=list)


class _Side:
    """One of the two graphs while it is scored."""

    def __init__(self, quantized: QuantizedModel, provider: Provider) -> None:
        path = quantized.model.path
        self._predictor: Predictor = OnnxPredictor(path, provider=provider)
        try:
            self._twin: Twin | None = twin_of_session(path, provider=provider)
        except UnconvertibleGraph:
            self._twin = None  # no twin to watch the quantisers in: the counts are left out
        self._tally, self._clean, self._attacked = _Tally(), _Watch(), _Watch()

    def score(self, batch: Batch, attacked: list[Tensor]) -> None:
        clean = correct(self._predictor, batch.images, batch.labels)
        robust = clean.clone()
        for images in attacked:  # of several restarts the worst counts for every graph on its own
            robust &= correct(self._predictor, images, batch.labels)
        self._tally.clean.append(clean)
        self._tally.robust.append(robust)
        if self._twin is not None and self._clean.images < WATCHED_IMAGES:
            self._clean.add(self._twin, batch.images)
            self._attacked.add(self._twin, attacked[0])

    def flags(self) -> tuple[Tensor, Tensor]:
        """Which images are right, clean and in the worst case."""
        return torch.cat(self._tally.clean), torch.cat(self._tally.robust)

    def result(self) -> CalibrationScore:
        clean, robust = (Proportion.of(flags) for flags in self.flags())
        return CalibrationScore(clean, robust, self._clean.share, self._attacked.share)
