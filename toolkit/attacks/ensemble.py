"""Which attacks make up a worst-case evaluation: single ones by name, and compositions from cheap to dear."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from toolkit.attacks.apgd import apgd, apgd_targeted
from toolkit.attacks.carlini_wagner import carlini_wagner
from toolkit.attacks.deepfool import deepfool
from toolkit.attacks.fab import fab_targeted
from toolkit.attacks.fgsm import fgsm
from toolkit.attacks.fmn import fmn
from toolkit.attacks.mim import mim
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.survivors import Settle
from toolkit.attacks.threat import ThreatModel
from toolkit.errors import ToolkitError, unknown_name

SQUARE = "square"
"""The one attack that needs no gradients: it runs on the graph that counts itself."""
PGD = "pgd"
"""The attack of the transfer matrix, which every evaluation makes."""
ALL_NORMS = ("linf", "l2", "l1")


@dataclass(frozen=True, slots=True)
class Recipe:
    """An attack that needs gradients, and what it is called with."""

    attack: Callable[..., object]
    """(surrogate, images, labels, threat, *, settle, ...); what it finds it hands to `settle`."""
    steps: int | None
    """Gradients per image when it is asked for by name; None: it has no such argument."""
    targeted: bool = False
    """It takes a `rank`."""
    random: bool = True
    """It takes a `generator`."""
    norms: tuple[str, ...] = ALL_NORMS
    exact: bool = False
    """It looks for the boundary itself, so gradients in bfloat16 mislead it."""


STEPS = 100
LONG = 50
"""Gradients after which those who are in a hurry go on with another attack."""
QUERIES = 5000
SHORT_SEARCH = 100
"""Queries that show, on every image that is left, whether gradients are masked."""
ONWARD_SEARCH = 3000
"""Queries that go on where attacks by gradients are stuck."""
TARGETS = 9
"""Other classes that a targeted attack of AutoAttack tries."""

GRADIENT_ATTACKS: Mapping[str, Recipe] = {
    "fgsm": Recipe(fgsm, None, random=False),
    "mim": Recipe(mim, 20, random=False),
    "deepfool": Recipe(deepfool, 50, random=False, norms=("linf", "l2"), exact=True),
    "fmn": Recipe(fmn, STEPS, random=False, exact=True),
    "apgd-ce": Recipe(partial(apgd, loss="cross_entropy"), STEPS),
    "apgd-dlr": Recipe(partial(apgd, loss="dlr"), STEPS),
    "apgd-margin": Recipe(partial(apgd, loss="margin"), STEPS),
    "cw": Recipe(carlini_wagner, STEPS, random=False, norms=("l2",), exact=True),
    "apgd-t": Recipe(partial(apgd_targeted, reachable_only=True), STEPS, targeted=True),
    "fab-t": Recipe(partial(fab_targeted, reachable_only=True), STEPS, targeted=True, exact=True),
}
"""By name, from cheap to dear."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One attack, run once on all images that are left."""

    attack: str
    steps: int
    """Gradients, or queries, per image, and of each rank or start."""
    ranks: tuple[int, ...] = ()
    """Of a targeted attack: it aims at the image's so-many-th likeliest other classes, at all of them at once."""
    everywhere: bool = False
    """Made on every surrogate; otherwise, for every graph that is compared, on those that transfer to it best."""
    near: float = 0.0
    """Made on images only that earlier attacks brought so near the boundary, of their clean margin (0: on all)."""
    exact: bool = False
    """In float32: beside the boundary gradients in bfloat16 mislead."""
    onward: bool = False
    """From the nearest point to the boundary that earlier attacks came to."""
    starts: int = 1
    """Random starts of an attack that is not targeted, side by side."""
    where_masked: bool = False
    """Made only where a search by queries before it found what gradients should have, which then know no near one."""

    @property
    def by_queries(self) -> bool:
        return self.attack == SQUARE

    @property
    def copies(self) -> int:
        """How many searches of one image go on side by side."""
        return len(self.ranks) or self.starts

    def run(
        self,
        surrogate: Surrogate,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        generator: torch.Generator,
        settle: Settle,
        start: Tensor | None = None,
    ) -> None:
        """Make the attack, of a kind that needs gradients; what it finds is handed to `settle`.

        Args:
            surrogate: what it is made on.
            images: float32 [n, C, H, W] in [0, 1].
            labels: int64 [n], the true classes.
            threat: the ball.
            generator: of everything random.
            settle: judges attacked images.
            start: float32 [n, C, H, W], where an attack begins that goes `onward`.
        """
        recipe = GRADIENT_ATTACKS[self.attack]
        how: dict[str, object] = {"settle": settle}
        if recipe.steps is not None:
            how["steps"] = self.steps
        if recipe.random:
            how["generator"] = generator
        if self.onward:
            how["start"] = None if start is None else start.repeat(self.copies, 1, 1, 1)
        if recipe.targeted:
            how["rank"] = torch.tensor(self.ranks).repeat_interleave(len(images))
        if self.copies > 1:
            count = len(images)
            images, labels = images.repeat(self.copies, 1, 1, 1), labels.repeat(self.copies)
            how["settle"] = lambda attacked, positions: settle(attacked, positions % count)
        exact = self.exact or recipe.exact
        recipe.attack(surrogate.exact() if exact else surrogate, images, labels, threat, **how)

    def __str__(self) -> str:
        target = f" to class {', '.join(map(str, self.ranks))}" if self.ranks else ""
        starts = f" x {self.starts}" if self.starts > 1 else ""
        return f"{self.attack}-{self.steps}{starts}{target}{' from there' if self.onward else ''}"


HALFWAY, NEAR, CLOSE, BESIDE, TOUCHING = 0.65, 0.75, 0.85, 0.9, 0.97
"""How near the boundary short attacks must have brought an image for further short attacks, for long ones (in `fast`
from `CLOSE` on), for the dearest and further starts, and for starts around it, to be made on it. How many images each
of them costs is in docs/results (attack-passes, autoattack, onward)."""
ALL_RANKS = tuple(range(1, TARGETS + 1))
_SHORT = (Pass("apgd-ce", 20), Pass("apgd-t", 20, (1,)), Pass("apgd-t", 20, (2, 3), near=HALFWAY))
FAST = (
    *_SHORT,
    Pass("apgd-ce", LONG, near=CLOSE),
    Pass("apgd-t", STEPS, ALL_RANKS, near=CLOSE, exact=True),
    Pass("apgd-margin", STEPS, near=TOUCHING, exact=True, onward=True, starts=3),
    Pass(SQUARE, SHORT_SEARCH),
    Pass(SQUARE, ONWARD_SEARCH, near=BESIDE, onward=True),
    Pass(SQUARE, QUERIES, where_masked=True),
)
"""Of the ensemble what pays (benchmarks/attack_passes.py): long attacks begin nearer the boundary, where nearly all is
fooled that they fool; FAB, without which the rest leaves about as little, is not made. What the ensemble has not:
starts around the nearest image so far, which find more than as many random ones (docs/results, onward)."""
ENSEMBLE = (
    *_SHORT,
    Pass("apgd-ce", STEPS, everywhere=True, near=NEAR),
    Pass("apgd-t", STEPS, ALL_RANKS, near=NEAR, exact=True),
    Pass("fab-t", STEPS, ALL_RANKS[:1], near=NEAR),
    Pass("apgd-t", STEPS, ALL_RANKS, near=BESIDE, exact=True),  # from another random start
    Pass("fab-t", STEPS, ALL_RANKS[1:], near=BESIDE),
    Pass(SQUARE, SHORT_SEARCH),
    Pass(SQUARE, ONWARD_SEARCH, near=NEAR, onward=True),
    Pass(SQUARE, QUERIES, near=BESIDE),
    Pass(SQUARE, QUERIES, where_masked=True),
)
"""AutoAttack's standard composition (Croce & Hein 2020) behind short forms of its parts, which spare it most images."""
COMPOSITIONS: Mapping[str, tuple[Pass, ...]] = {PGD: (), "fast": FAST, "ensemble": ENSEMBLE}


def compose(names: str, classes: int, norm: str | None = "linf") -> tuple[Pass, ...]:
    """The passes of a composition or of attacks by name, with commas between.

    Args:
        names: say `fast`, `ensemble`, or `apgd-ce,square`; `pgd` adds nothing to the transfer matrix.
        classes: of the network; targeted attacks have at most one target fewer.
        norm: of the threat model; None: not known yet, and not looked at.

    Raises:
        ToolkitError: an unknown name, or an attack that does not exist in this norm.
    """
    passes = [how for name in names.split(",") for how in _named(name.strip(), norm)]
    return fitting(passes, classes)


def fitting(passes: Iterable[Pass], classes: int) -> tuple[Pass, ...]:
    """Without the targets that so few classes do not have, and without attacks that are left without any."""
    fewer = [(how, tuple(rank for rank in how.ranks if rank < classes)) for how in passes]
    return tuple(replace(how, ranks=ranks) for how, ranks in fewer if ranks or not how.ranks)


def _named(name: str, norm: str | None) -> tuple[Pass, ...]:
    if name in COMPOSITIONS:
        return COMPOSITIONS[name]
    if name == SQUARE:
        return (Pass(SQUARE, QUERIES),)
    recipe = GRADIENT_ATTACKS.get(name)
    if recipe is None:
        raise unknown_name("attack", name, (*COMPOSITIONS, *GRADIENT_ATTACKS, SQUARE))
    if norm is not None and norm not in recipe.norms:
        others = [other for other, found in GRADIENT_ATTACKS.items() if norm in found.norms]
        raise ToolkitError(
            f"the attack {name} does not exist in the norm {norm}",
            found=f"--attacks {name} with --norm {norm}",
            fix=f"choose from {', '.join((*others, SQUARE))}, or another --norm ({', '.join(recipe.norms)})",
        )
    steps = recipe.steps or 1
    if recipe.targeted:
        return (Pass(name, steps, ALL_RANKS[:1]), Pass(name, steps, ALL_RANKS[1:]))
    return (Pass(name, steps),)
