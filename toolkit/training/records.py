"""What is kept of a training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from toolkit.artifacts import Proportion, TorchModel
from toolkit.training.qat import LearntRanges


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """What one epoch came to on the validation part."""

    epoch: int
    loss: float
    accuracy: Proportion
    robust: Proportion | None

    @property
    def score(self) -> float:
        """By which epochs are compared: clean plus robust accuracy."""
        return self.accuracy.value + (self.robust.value if self.robust else 0.0)

    @property
    def standard_error(self) -> float:
        """Of the score, as if its parts were independent."""
        shares = [self.accuracy, *([self.robust] if self.robust else [])]
        return math.sqrt(sum(share.value * (1 - share.value) / share.total for share in shares))

    def is_kept_after(self, earlier: Sequence[EpochRecord]) -> bool:
        """Whether this epoch's weights replace those of an earlier one.

        They do unless they are worse than the best by more than its standard error: among epochs that validation cannot
        tell apart, the last has learnt longest, at the lowest rate.
        """
        best = max(earlier, key=lambda record: record.score, default=self)
        return self.score >= best.score - best.standard_error

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
    """The network of the epoch that is kept, and how every epoch went."""

    model: TorchModel
    epochs: tuple[EpochRecord, ...]
    best_epoch: int
    precision: str
    learnt: LearntRanges | None = None
    """Where the training rounded."""


class Observer(Protocol):
    """Sees what passes through a network while it learns, and is kept with the state of the training."""

    def attach(self, network: nn.Module) -> None:
        """Watch `network`; only what it computes in training mode counts."""

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as plain data."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
