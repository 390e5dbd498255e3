"""Which attacks make up a worst-case evaluation: single ones by name, and compositions from cheap to dear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from toolkit.attacks.apgd import apgd, apgd_targeted
from toolkit.attacks.fab import fab_targeted
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.survivors import Settle
from toolkit.attacks.threat import ThreatModel
from toolkit.errors import unknown_name

SQUARE = "square"
"""The one attack that needs no gradients: it runs on the graph that counts itself."""
PGD = "pgd"
"""The attack of the transfer matrix, which every evaluation makes."""

GradientAttack = Callable[..., object]
"""(surrogate, images, labels, threat, *, steps, generator, settle[, rank]); what it finds it hands to `settle`."""

UNTARGETED: Mapping[str, GradientAttack] = {
    "apgd-ce": partial(apgd, loss="cross_entropy"),
    "apgd-dlr": partial(apgd, loss="dlr"),
}
TARGETED: Mapping[str, GradientAttack] = {"apgd-t": apgd_targeted, "fab-t": fab_targeted}


@dataclass(frozen=True, slots=True)
class Pass:
    """One attack, run once on all images that are left."""

    attack: str
    steps: int
    """Gradients, or queries, per image."""
    rank: int | None = None
    """Of a targeted attack: it aims at the image's `rank`-th likeliest other class."""
    everywhere: bool = False
    """Made on every surrogate; otherwise on the one that transfers best."""

    @property
    def by_queries(self) -> bool:
        return self.attack == SQUARE

    def run(
        self,
        surrogate: Surrogate,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        generator: torch.Generator,
        settle: Settle,
    ) -> None:
        """Make the attack, of a kind that needs gradients; what it finds is handed to `settle`."""
        call = partial(TARGETED[self.attack], rank=self.rank) if self.rank else UNTARGETED[self.attack]
        call(surrogate, images, labels, threat, steps=self.steps, generator=generator, settle=settle)

    def __str__(self) -> str:
        target = "" if self.rank is None else f" to class {self.rank}"
        return f"{self.attack}-{self.steps}{target}"


STEPS = 100
QUERIES = 5000
TARGETS = 9
"""Other classes that a targeted attack of AutoAttack tries."""
ENSEMBLE = (
    Pass("apgd-ce", STEPS, everywhere=True),
    *(Pass("apgd-t", STEPS, rank) for rank in range(1, TARGETS + 1)),
    *(Pass("fab-t", STEPS, rank) for rank in range(1, TARGETS + 1)),
    Pass(SQUARE, QUERIES),
)
"""AutoAttack's standard composition (Croce & Hein 2020)."""
FAST = (
    Pass("apgd-ce", 20),
    *(Pass("apgd-t", 20, rank) for rank in (1, 2, 3)),
    Pass(SQUARE, 300),
)
COMPOSITIONS: Mapping[str, tuple[Pass, ...]] = {PGD: (), "fast": FAST, "ensemble": ENSEMBLE}


def compose(names: str, classes: int) -> tuple[Pass, ...]:
    """The passes of a composition or of attacks by name, with commas between.

    Args:
        names: say `fast`, `ensemble`, or `apgd-ce,square`; `pgd` adds nothing to the transfer matrix.
        classes: of the network; targeted attacks have at most one target fewer.

    Raises:
        ToolkitError: an unknown name.
    """
    passes = [how for name in names.split(",") for how in _named(name.strip())]
    return tuple(how for how in passes if how.rank is None or how.rank < classes)


def _named(name: str) -> tuple[Pass, ...]:
    if name in COMPOSITIONS:
        return COMPOSITIONS[name]
    if name == SQUARE:
        return (Pass(SQUARE, QUERIES),)
    if name in UNTARGETED:
        return (Pass(name, STEPS),)
    if name in TARGETED:
        return tuple(Pass(name, STEPS, rank) for rank in range(1, TARGETS + 1))
    raise unknown_name("attack", name, (*COMPOSITIONS, *UNTARGETED, *TARGETED, SQUARE))
