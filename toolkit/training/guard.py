"""The guard of single-step training against catastrophic overfitting (Wong et al. 2020; Andriushchenko et al. 2020).

A network trained against a single step may learn, within a few hundred optimiser steps, to withstand that step alone:
its accuracy under FGSM stays high and under PGD falls to nothing. At intervals both are measured on a few images; when
they part, the weights go back to the last good state and the attack becomes PGD.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from toolkit.artifacts import Proportion

INTERVAL = 100
"""Optimiser steps between two checks."""
IMAGES = 128
"""Validation images of a check."""
STEPS = 5
"""PGD steps of a check."""
GAP = 0.2
"""By how much accuracy under PGD may lie below that under FGSM."""
FALL = 0.1
"""By how much accuracy under PGD must have fallen for a gap to count while the network is not yet robust."""
SETTLED = 0.25
"""Share of the training after which a gap alone counts."""


@dataclass
class OverfittingGuard:
    """Keeps the last good state, and says when the training has collapsed."""

    good: dict[str, Any] = field(default_factory=dict)
    """Weights and optimiser as `check` was given them at the last good check, or at the start."""
    best: float = 0.0
    """Highest accuracy under PGD of all checks."""
    collapse: dict[str, Any] | None = None
    """Step, and correct images of all under FGSM and PGD, when it collapsed; None: it has not."""

    def check(self, step: int, done: float, fgsm: Proportion, pgd: Proportion, current: dict[str, Any]) -> bool:
        """Whether the training has collapsed; if it has not, `current` is the new good state.

        A network that comes in undefended is weaker against PGD too, so early on a gap counts only with a fall of the
        accuracy under PGD; later, single steps that leave such a gap are no training against PGD.

        Args:
            step: optimiser steps taken.
            done: share of the training, in [0, 1].
            fgsm: right under the attack of training.
            pgd: right under PGD, on the same images.
            current: weights and optimiser; copied.
        """
        gap = fgsm.value - pgd.value > GAP
        fallen = pgd.value < self.best - FALL
        if gap and (fallen or done > SETTLED):
            self.collapse = {
                "step": step,
                "fgsm": [fgsm.correct, fgsm.total],
                "pgd": [pgd.correct, pgd.total],
            }
            return True
        self.good, self.best = copy.deepcopy(current), max(self.best, pgd.value)
        return False

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as plain data and tensors."""
        return {"good": self.good, "best": self.best, "collapse": self.collapse}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.good, self.best, self.collapse = state["good"], state["best"], state["collapse"]
