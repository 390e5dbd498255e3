"""`--calibrate auto`: the calibration method that loses least on validation images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolkit.config import CalibrationName
from toolkit.evaluators.judge import Drop, Judge
from toolkit.exporters.engine import Writer
from toolkit.progress import task

TIE = 0.002
"""Methods whose losses, clean and robust together, are so near the least one are told apart by the logits."""


@dataclass(frozen=True, slots=True)
class MethodScore:
    """What one calibration method comes to."""

    method: CalibrationName
    drop: Drop
    """Against the float twin."""
    disturbance: float
    """Mean squared difference of the logits from the float twin's, on clean images."""

    @property
    def lost(self) -> float:
        """Clean and robust accuracy lost together."""
        return self.drop.clean + (self.drop.robust or 0.0)


@dataclass(frozen=True)
class CalibrationChoice:
    """All methods, and the one that is taken."""

    scores: tuple[MethodScore, ...]
    chosen: CalibrationName
    images: int


def choose_calibration(quantizer: Writer, folder: Path, judge: Judge) -> CalibrationChoice:
    """Write and judge one graph for every method; the calibration images are not read again.

    Args:
        quantizer: with `calibrate` at `auto`, so that all statistics are there.
        folder: where the graphs are written; the caller's to remove.
        judge: of accuracy.
    """
    scores = []
    with task("calibration methods", len(quantizer.methods)) as bar:
        for method in quantizer.methods:
            path = folder / f"{method}.onnx"
            quantizer.with_calibration(method).write(path)
            scores.append(MethodScore(method, judge.drop(path), judge.disturbance(path)))
            bar.advance()
    return CalibrationChoice(tuple(scores), best_method(scores), judge.images)


def best_method(scores: list[MethodScore]) -> CalibrationName:
    """The method that loses least; of several that cannot be told apart the one that disturbs the logits least."""
    least = min(score.lost for score in scores)
    near = [score for score in scores if score.lost <= least + TIE]
    return min(near, key=lambda score: score.disturbance).method
