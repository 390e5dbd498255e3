"""What is kept of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from toolkit.artifacts import Proportion, TorchModel


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """What one epoch came to on the validation part."""

    epoch: int
    loss: float
    accuracy: Proportion
    robust: Proportion | None

    @property
    def score(self) -> float:
        """By which the best epoch is chosen: clean plus robust accuracy."""
        return self.accuracy.value + (self.robust.value if self.robust else 0.0)

    def to_list(self) -> list[Any]:
        """As plain data; `from_list` is the inverse."""
        robust = [self.robust.correct, self.robust.total] if self.robust else None
        return [self.epoch, self.loss, [self.accuracy.correct, self.accuracy.total], robust]

    @classmethod
    def from_list(cls, values: list[Any]) -> EpochRecord:
        """The inverse of `to_list`."""
        epoch, loss, clean, robust = values
        return cls(epoch, loss, Proportion(*clean), Proportion(*robust) if robust else None)


@dataclass(frozen=True)
class TrainingResult:
    """The network of the best epoch, and how every epoch went."""

    model: TorchModel
    epochs: tuple[EpochRecord, ...]
    best_epoch: int
    precision: str
