"""What is to be filled: a table or figure on one data set, and its places."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from toolkit.reproduce import paper, targets
from toolkit.reproduce.protocol import Experiment
from toolkit.reproduce.recipes import Planner, Recipe
from toolkit.reproduce.steps import Step
from toolkit.reproduce.targets import Cell, Curve, Target
from toolkit.reproduce.world import World


@dataclass(frozen=True, eq=False)
class Place:
    """One cell of one seed: the step that fills it."""

    name: str
    """`ROW; COLUMN`; of a figure, its curve and the point on it."""
    step: Step
    planner: Planner
    tier: int
    rank: int
    """Of the seed in the list."""
    result_only: bool = False
    """Whether the place shows what the step took, for which its network need not be kept."""


@dataclass
class Panel:
    """A table or figure on one data set."""

    target: Target
    experiment: Experiment
    network: str
    world: World | None
    missing: str = ""
    """Why nothing can be run; empty if it can."""
    planners: dict[int, Planner] = field(default_factory=dict)
    """By seed."""

    @property
    def comparable(self) -> bool:
        """Whether the paper's numbers are of these images and this network."""
        if self.world is None:
            return self.network == self.experiment.network
        return self.world.has_the_papers_images and self.network == self.experiment.network

    @cached_property
    def cells(self) -> list[Cell]:
        """The paper's cells, and behind them those that it does not have."""
        kind, experiment = self.target.kind, self.experiment
        found = targets.baselines(experiment) if kind in ("baselines", "appendix") else []
        if kind == "main":
            fashion = experiment.data == "fashion-mnist"
            found += targets.compressed(
                experiment, paper.FASHION_MNIST_COMPRESSED if fashion else paper.CIFAR10_COMPRESSED
            )
            found += targets.beyond(experiment)
        elif kind == "appendix":
            fashion = experiment.data == "fashion-mnist"
            numbers = paper.FASHION_MNIST_APPENDIX if fashion else paper.CIFAR10_APPENDIX
            found = targets.renumbered([*found, *targets.compressed(experiment, numbers)], numbers)
        elif kind == "time":
            found = targets.timed(experiment)
        return found

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """The panels of a figure over compression."""
        return targets.curves(self.target.name) if self.target.kind == "curves" else ()

    @property
    def recipes(self) -> dict[str, Recipe]:
        """The networks of figure 2."""
        return targets.embedded(self.experiment) if self.target.kind == "embedding" else {}

    def step(self, cell: Cell, seed: int) -> Step:
        """The step that fills a cell."""
        return self.planners[seed].measure(cell.recipe, cell.measure)

    def trained(self, cell: Cell, seed: int) -> Step:
        """The step that makes a cell's network."""
        return self.planners[seed].network_of(cell.recipe)

    def places(self) -> list[Place]:
        """Everything that is to be filled."""
        found = []
        for rank, (seed, planner) in enumerate(self.planners.items()):
            timed = self.target.kind == "time"
            of_cells = self.trained if timed else self.step
            for cell in self.cells:
                name = f"{cell.row}; {cell.column}"
                found.append(Place(name, of_cells(cell, seed), planner, cell.tier, rank, timed))
            for curve in self.curves:
                for point, recipe in curve.points.items():
                    step = planner.measure(recipe, "pgd-paper")
                    found.append(Place(f"{curve.title}; {point:g}", step, planner, 1, rank))
            if self.recipes and rank == 0:
                step = planner.embed(self.recipes, targets.EMBEDDED_CLASS)
                found.append(Place("t-SNE", step, planner, 2, rank))
        return found
