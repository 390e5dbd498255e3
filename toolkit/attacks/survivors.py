"""The images of a batch that an attack still has to fool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Protocol, TypeVar

import torch
from torch import Tensor

Settle = Callable[[Tensor, Tensor], Tensor]
"""Attacked images [m, C, H, W] and their positions int64 [m] in the batch; which of them need no more attacking,
bool [m]. Only the graph that counts may say that one is fooled: never the surrogate."""
State = TypeVar("State")


class Climbing(Protocol):
    """The state of an attack that raises a loss."""

    labels: Tensor
    current: Tensor
    """The points of the last step, float32 [m, C, H, W]."""
    best: Tensor
    """Those of highest loss."""


Climber = TypeVar("Climber", bound=Climbing)


class Survivors:
    """Keeps the result of an attack on a batch, and which of its images are still attacked.

    Args:
        images: float32 [n, C, H, W], where the attack runs; the result starts as these.
        settle: judges attacked images; None: all images are attacked to the end.
    """

    def __init__(self, images: Tensor, settle: Settle | None) -> None:
        self.result = images.clone()
        self.positions = torch.arange(len(images), device=images.device)
        self._settle = settle

    def __len__(self) -> int:
        return len(self.positions)

    def submit(self, attacked: Tensor, suspected: Tensor) -> Tensor | None:
        """Have those of the attacked images judged that the surrogate takes for fooled.

        Args:
            attacked: float32 [m, C, H, W], one per survivor.
            suspected: bool [m].

        Returns:
            Which survivors remain, bool [m]; None if all do. What belongs to them is to be narrowed to these rows.
        """
        if self._settle is None or not bool(suspected.any()):
            return None
        rows = suspected.nonzero()[:, 0]
        gone = rows[self._settle(attacked[rows], self.positions[rows]).to(rows.device)]
        if not len(gone):
            return None
        self.result[self.positions[gone]] = attacked[gone]
        keep = torch.ones(len(self.positions), dtype=torch.bool, device=rows.device)
        keep[gone] = False
        self.positions = self.positions[keep]
        return keep

    def leave(self, attacked: Tensor, hopeless: Tensor) -> Tensor | None:
        """Attack some survivors no more, although nothing fools the graph that counts.

        Args:
            attacked: float32 [m, C, H, W], one per survivor: their results.
            hopeless: bool [m].

        Returns:
            As `submit` does.
        """
        if not bool(hopeless.any()):
            return None
        self.result[self.positions[hopeless]] = attacked[hopeless]
        self.positions = self.positions[~hopeless]
        return ~hopeless

    def finish(self, attacked: Tensor) -> Tensor:
        """The attacked images of the whole batch, [n, C, H, W], with `attacked` those of the survivors."""
        self.result[self.positions] = attacked
        return self.result


def both(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """Which survivors remain after two submissions, of which the second saw what remained after the first."""
    if first is None or second is None:
        return second if first is None else first
    return first.scatter(0, first.nonzero()[:, 0], second)


def judged(state: Climber, survivors: Survivors, logits: Tensor, *, everything: bool) -> Climber:
    """The state of the images that remain once the points of the last step are judged that look as if they fooled.

    Args:
        state: one row per survivor.
        survivors: whose judge is asked.
        logits: of the surrogate at `state.current`.
        everything: judge all best points as well.
    """
    keep = survivors.submit(state.current, logits.argmax(dim=1) != state.labels)
    if keep is not None:
        state = narrowed(state, keep)
    if everything:
        keep = survivors.submit(state.best, torch.ones_like(state.labels, dtype=torch.bool))
        if keep is not None:
            state = narrowed(state, keep)
    return state


def narrowed(state: State, keep: Tensor) -> State:
    """A dataclass of tensors with one row per survivor, narrowed to the rows in `keep`."""
    rows = {field.name: getattr(state, field.name)[keep] for field in fields(state)}  # type: ignore[arg-type]
    return type(state)(**rows)
