"""`toolkit search --dry-run`: what would be tried, and for about how long."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from toolkit.config import SearchRunConfig
from toolkit.graphs import with_rounding
from toolkit.pipeline import resolve
from toolkit.planning import PlannedStep, gradients, seconds_per_image
from toolkit.pruning import prune
from toolkit.search.front import Limits
from toolkit.search.search import Search, prepare_search
from toolkit.search.space import Dimension
from toolkit.training.losses import cost_per_image

GRAPHS_S, BENCHMARK_S = 10.0, 15.0
"""Seconds to write, choose and time the graphs of one trial; to time bundles side by side."""


def dry_run(config: SearchRunConfig, output: Path) -> list[PlannedStep]:
    """What `search` would do; loads and checks everything that it does, writes nothing.

    The estimate is that of the configuration from which the search starts, for every trial: those that share a
    fine-tuning take less.

    Raises:
        ToolkitError: bad input.
    """
    ready = prepare_search(config, output)
    how, seeds, space = config.search, config.seeds, ready.space
    trial, full = _seconds(ready)
    varied = "; ".join(f"{dimension.name} {_values(dimension)}" for dimension in space.dimensions)
    workers = how.workers if how.address is not None and how.workers else 1
    limits = {name: limit for name, limit in asdict(Limits.of(config)).items() if limit is not None}
    asked = ", ".join(f"{name} {limit:g}" for name, limit in limits.items())
    start = ", ".join(f"{name} {value}" for name, value in space.start().items())
    tries = min(how.trials, space.size)
    bundles = min(how.bundles, tries)
    trials_s = tries * len(seeds) * trial / workers
    return [
        PlannedStep(f"space      {space.size:,} points: {varied}", 0.0),
        PlannedStep(
            f"trials     {tries} under {len(seeds)} seed(s), from {start}: {how.attacks} on "
            f"{len(ready.laboratory.prepared.splits.evaluation):,} validation images, {trial:.0f} s each",
            min(trials_s, how.budget or trials_s),
        ),
        PlannedStep(
            f"front      {bundles} bundles with full evidence, or up to twice as many; limits: {asked or 'none'}",
            bundles * full + BENCHMARK_S,
        ),
    ]


def _values(dimension: Dimension) -> str:
    """A range by its ends, labels one by one."""
    values = dimension.values
    if dimension.step is None:
        return ", ".join(map(str, values))
    return f"{values[0]} to {values[-1]} by {dimension.step:g}"


def _seconds(ready: Search) -> tuple[float, float]:
    """Of one trial, and of the full evidence for one bundle, whose fine-tuning is there already."""
    prepared, laboratory = ready.laboratory.prepared, ready.laboratory
    config = resolve(ready.space.config(ready.space.start(), ready.config.seeds[0]), prepared)
    forward = seconds_per_image(prune(prepared.model, with_rounding(config.prune, None)).model, config)
    tuning = config.finetune.epochs * len(prepared.splits.train) * cost_per_image(config.finetune)
    cheap = config.model_copy(update={"attack": config.attack.model_copy(update={"attacks": laboratory.attacks})})
    judged = gradients(cheap, prepared, len(prepared.splits.evaluation))
    whole = replace(prepared, splits=laboratory.whole)
    full = gradients(config, whole, len(whole.splits.evaluation))
    return (tuning + judged) * forward + GRAPHS_S, full * forward + GRAPHS_S
