"""The tables and figures: which cells each has, and the paper's numbers beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from toolkit.errors import unknown_name
from toolkit.reproduce import paper
from toolkit.reproduce.paper import CellKey, PaperCell
from toolkit.reproduce.protocol import BITS, SPARSITIES, Experiment
from toolkit.reproduce.recipes import Finetuning, Form, Measure, Recipe, Start

ALL = "all"
STARTS: tuple[Start, ...] = ("standard", "robust")
FINETUNINGS: tuple[Finetuning, ...] = ("none", "standard", "adversarial")


@dataclass(frozen=True)
class Cell:
    """One place of a table: a network, how it is measured, and what the paper says."""

    row: str
    column: str
    """Fine-tuning; of what the paper does not have, the measure."""
    recipe: Recipe
    measure: Measure = "pgd-paper"
    paper: PaperCell | None = None
    tier: int = 0
    """Cells of lower tiers are filled first."""


@dataclass(frozen=True)
class Target:
    """One table or figure."""

    name: str
    title: str
    place: str
    """Where in the paper, as far as that is known."""
    data: tuple[str, ...]
    """Whose numbers the paper has there."""
    kind: Literal["baselines", "main", "appendix", "time", "curves", "embedding"]

    @property
    def of_one_data_set(self) -> bool:
        """Whether it has one data set in the paper, and so no place for a second one beside it."""
        return self.kind in ("main", "appendix")


NUMBERING = (
    "The paper's own numbers of its tables are not all known here: these names are ours, in the order of its text."
)
TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("table2", "Baselines", "main text", ("fashion-mnist", "cifar10"), "baselines"),
        Target("table3", "compressed", "main text; the appendix repeats it", ("fashion-mnist",), "main"),
        Target("table4", "compressed", "main text", ("cifar10",), "main"),
        Target("table5", "compressed, as in the appendix", "appendix", ("cifar10",), "appendix"),
        Target(
            "table6",
            "Time of fine-tuning against full adversarial training",
            "main text; its numbers are not at hand",
            ("fashion-mnist", "cifar10"),
            "time",
        ),
        Target(
            "figure1",
            "Compression of the standard network, adversarially fine-tuned",
            "main text",
            ("fashion-mnist", "cifar10"),
            "curves",
        ),
        Target("figure2", "t-SNE of images and layers", "main text", ("fashion-mnist",), "embedding"),
        Target("figure3", "Compression without fine-tuning", "main text", ("fashion-mnist", "cifar10"), "curves"),
        Target(
            "figure4", "Quantisation-aware training over precision", "main text", ("fashion-mnist", "cifar10"), "curves"
        ),
    )
}


def find_targets(name: str) -> tuple[Target, ...]:
    """The table or figure of that name, or `all`.

    Raises:
        ToolkitError: there is none; with the nearest name.
    """
    if name == ALL:
        return tuple(TARGETS.values())
    if name not in TARGETS:
        raise unknown_name("table or figure", name, (*TARGETS, ALL))
    return (TARGETS[name],)


def baselines(experiment: Experiment) -> list[Cell]:
    """The networks that nothing is removed from."""
    known = paper.FASHION_MNIST_BASELINES if experiment.data == "fashion-mnist" else paper.CIFAR10_BASELINES
    recipes: dict[CellKey, Recipe] = {
        (paper.STANDARD, "none"): Recipe("standard"),
        (paper.ROBUST, "none"): Recipe("robust"),
        (paper.STANDARD, "adversarial"): Recipe("standard", tuned="adversarial"),
    }
    return _cells(recipes, known)


def compressed(experiment: Experiment, numbers: Mapping[CellKey, PaperCell]) -> list[Cell]:
    """Networks pruned to the chosen level, and quantised, with every kind of fine-tuning."""
    recipes: dict[CellKey, Recipe] = {}
    for start in STARTS:
        for tuned in FINETUNINGS:
            recipes[f"pruned, from {start}", tuned] = Recipe(start, experiment.pruned, tuned)
            recipes[f"PTQ int8, from {start}", tuned] = _rounded(start, tuned)
    recipes[paper.QAT_ROBUST, "adversarial"] = _trained_rounded("simulated")
    return _cells(recipes, numbers)


def _rounded(start: Start, tuned: Finetuning, bits: int = 8) -> Recipe:
    """Fine-tuned while ranges are recorded, and then quantised."""
    return Recipe(start, tuned=tuned, form="simulated", bits=bits, tuned_as="with_quantisation")


def _trained_rounded(form: Form, bits: int = 8) -> Recipe:
    """After quantisation-aware training, whose attacks go through the rounding."""
    return Recipe("standard", tuned="adversarial", form=form, bits=bits, tuned_as="with_rounding")


def _cells(recipes: Mapping[CellKey, Recipe], numbers: Mapping[CellKey, PaperCell]) -> list[Cell]:
    return [Cell(row, column, recipe, paper=numbers.get((row, column))) for (row, column), recipe in recipes.items()]


def renumbered(cells: Sequence[Cell], numbers: Mapping[CellKey, PaperCell]) -> list[Cell]:
    """The cells for which `numbers` has a value, with it."""
    found = []
    for cell in cells:
        known = numbers.get((cell.row, cell.column))
        if known is not None:
            found.append(replace(cell, paper=known))
    return found


def timed(experiment: Experiment) -> list[Cell]:
    """Full adversarial training, and what is fine-tuned in its place."""
    level = experiment.pruned
    recipes: dict[str, Recipe] = {
        "full adversarial training": Recipe("robust"),
        "adversarial fine-tuning": Recipe("standard", tuned="adversarial"),
        "adversarial fine-tuning, PTQ int8": _rounded("standard", "adversarial"),
        "pruned, adversarial fine-tuning": Recipe("standard", level, "adversarial"),
        "pruned, standard fine-tuning": Recipe("standard", level, "standard"),
    }
    return [Cell(row, "time", recipe) for row, recipe in recipes.items()]


PGD, PIXEL = "PGD-20, paper", "PGD-20, pixel"
BEYOND: Mapping[str, tuple[Measure, int]] = {
    PGD: ("pgd-paper", 1),
    PIXEL: ("pgd-pixel", 2),
    "AutoAttack, paper": ("autoattack-paper", 3),
    "AutoAttack, pixel": ("autoattack-pixel", 3),
    "DeepFool, paper": ("deepfool-paper", 3),
    "PGD-20, l2": ("pgd-l2", 4),
}
"""Columns of what the paper never had, with their tiers; `paper` and `pixel` are the two readings of eps."""


def beyond(experiment: Experiment) -> list[Cell]:
    """Networks and measures that the paper does not have: both compressions at once, integers, stronger attacks."""
    level = experiment.pruned
    rows: dict[str, Recipe] = {
        "standard": Recipe("standard"),
        "robust": Recipe("robust"),
        "pruned": Recipe("standard", level, "adversarial"),
        "PTQ int8, simulated": Recipe("standard", tuned="adversarial", form="simulated", tuned_as="with_quantisation"),
        "PTQ int8, integer graph": Recipe(
            "standard", tuned="adversarial", form="integer", tuned_as="with_quantisation"
        ),
        "pruned and int8, simulated": Recipe("standard", level, "adversarial", "simulated"),
        "pruned and int8, integer graph": Recipe("standard", level, "adversarial", "integer"),
        "QAT int8, simulated": _trained_rounded("simulated"),
        "QAT int8, integer graph": _trained_rounded("integer"),
        "pruned, distilled from robust": Recipe("standard", level, "distill"),
        "pruned and int8, distilled, integer graph": Recipe("standard", level, "distill", "integer"),
    }
    cells = []
    for row, recipe in rows.items():
        for column, (measure, tier) in BEYOND.items():
            dear = recipe.tuned == "distill" or recipe.start == "robust" or recipe.tuned_as == "with_rounding"
            cells.append(Cell(row, column, recipe, measure, tier=tier + int(dear)))
    return cells


@dataclass(frozen=True)
class Curve:
    """One panel of a figure: networks over sparsity or over precision."""

    title: str
    axis: str
    points: Mapping[float, Recipe]


def curves(name: str) -> tuple[Curve, ...]:
    """The panels of a figure."""
    if name == "figure4":
        points = {float(bits): _trained_rounded("simulated", bits) for bits in BITS}
        return (Curve("quantisation-aware training", "bits", points),)
    tuned: Finetuning = "adversarial" if name == "figure1" else "none"
    found = []
    for start in STARTS[:1] if name == "figure1" else STARTS:
        pruned = {ratio: Recipe(start, ratio, tuned) for ratio in SPARSITIES}
        rounded = {float(bits): _rounded(start, tuned, bits) for bits in BITS}
        found += [
            Curve(f"pruned, from {start}", "share of filters removed", pruned),
            Curve(f"quantised, from {start}", "bits", rounded),
        ]
    return tuple(found)


EMBEDDED_CLASS = "Bag"


def embedded(experiment: Experiment) -> dict[str, Recipe]:
    """The networks of figure 2: whole, quantised and pruned, each after standard and after adversarial training.

    Of the compressed networks that is our reading: fine-tuned from the standard network in the one way or the other.
    """
    level = experiment.pruned
    return {
        "standard, full": Recipe("standard"),
        "standard, quantised": Recipe("standard", 0, "standard", "simulated", tuned_as="with_quantisation"),
        "standard, pruned": Recipe("standard", level, "standard"),
        "robust, full": Recipe("robust"),
        "robust, quantised": Recipe("standard", 0, "adversarial", "simulated", tuned_as="with_quantisation"),
        "robust, pruned": Recipe("standard", level, "adversarial"),
    }
