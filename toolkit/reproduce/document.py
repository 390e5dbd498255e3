"""What is known of a table or figure, as plain data: the JSON file, from which Markdown and plots are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit import __version__
from toolkit.artifacts import Proportion
from toolkit.bundle import sha256
from toolkit.evaluators.environment import environment_record
from toolkit.models.loading import resolve_path
from toolkit.paths import public_name
from toolkit.reproduce.panels import Panel
from toolkit.reproduce.paper import Figure, PaperCell
from toolkit.reproduce.recipes import MEASURES, Recipe
from toolkit.reproduce.runner import Runner
from toolkit.reproduce.statistics import Mean, compare, holm
from toolkit.reproduce.steps import TRAININGS, Step
from toolkit.reproduce.targets import NUMBERING, Cell, Target

QUANTITIES = ("test", "robust")
DEVIATIONS_OF_ALL = (
    "the arithmetic of training and of the attacks' gradients is bfloat16 where the machine is fast in it "
    "(the paper: float32); every figure is scored in float32",
    "incomplete last batches of an epoch are left out",
    "the attack in training sees batch norm in evaluation mode (no difference for cnn8, which has none)",
    "the simulated integers: weights symmetric, activations asymmetric where a layer reads them, one grid a tensor "
    "(the paper's library rounds inputs and outputs of layers symmetrically, and outputs of ReLUs asymmetrically)",
    "QAT: in the last fifth of the training ranges stand still, and logits are not rounded; binary networks are not "
    "trained (the paper's figure has them)",
    "PTQ without fine-tuning: ranges over 500 training images (what the paper calibrated on is not known)",
    "the two defects of its published code are not repeated: networks are compressed with their trained weights, "
    "and integers are real where a row says integer graph",
)
DEVIATIONS: Mapping[str, tuple[str, ...]] = {
    "paper": (
        *DEVIATIONS_OF_ALL,
        "the rate falls after the fourth epoch (its text and its code differ by one)",
        "QAT: ranges follow the least and largest values at every step (in the paper's library at every pass, those of "
        "the attack too)",
    ),
    "fast": (
        "our own recipe: batches of 128, momentum 0.9, weight decay 0.0005, one-cycle rate with a peak of 0.05 (QAT: "
        "0.01), averaged weights; in training PGD-2 from a random start; some training images are held out and choose "
        "the epoch; as many epochs as the paper's, its pretrained network aside",
        "pruning takes filters of hidden linear layers too (the paper: of convolutions alone)",
        "QAT: the second half of the training rounds, weights in one grid an output channel",
        "PTQ: the ranges are those of all epochs of the fine-tuning, of the weights before they were averaged",
        *DEVIATIONS_OF_ALL,
    ),
}
"""In what the runs differ from the paper's, by protocol."""
PRETRAINED_ORIGIN = (
    "the paper's standard network of CIFAR-10 is one public checkpoint for all seeds (`resnet18_cifar10` of timm with "
    "the package detectors: 300 epochs, batches of 128, Nesterov momentum 0.9, weight decay 0.0005)"
)
PRETRAINING: Mapping[str, str] = {
    "paper": "; ours is trained for every seed, for 300 epochs by the protocol's own schedule, on the same four fifths",
    "fast": "; ours is trained for every seed, for 20 epochs",
}


def documents(runner: Runner) -> list[dict[str, Any]]:
    """One document for each table and figure that was asked for, with its data sets as panels."""
    return [_document(runner, target) for target in runner.targets]


def _document(runner: Runner, target: Target) -> dict[str, Any]:
    config = runner.config
    panels = [panel for panel in runner.panels if panel.target is target]
    return {
        "target": target.name,
        "title": _heading(target, panels),
        "kind": target.kind,
        "place": target.place,
        "numbering": NUMBERING,
        "protocol": config.protocol,
        "seeds": list(config.seeds),
        "pretrained": _pretrained(config.pretrained),
        "deviations": [*_of_networks(runner, panels), *DEVIATIONS[config.protocol]],
        "toolkit_version": __version__,
        "environment": environment_record(runner.threads),
        "panels": [_panel(runner, panel) for panel in panels],
    }


def _heading(target: Target, panels: Sequence[Panel]) -> str:
    """The target's title; of a table of one data set, with the name of that which it is filled with."""
    titles = [panel.experiment.title for panel in panels]
    return f"{titles[0]}, {target.title}" if target.of_one_data_set else target.title


def _of_networks(runner: Runner, panels: Sequence[Panel]) -> list[str]:
    """How the standard network of CIFAR-10 differs from the paper's."""
    if not any(panel.experiment.pretraining and panel.network == panel.experiment.network for panel in panels):
        return []
    brought = runner.config.pretrained is not None
    return [PRETRAINED_ORIGIN + ("; ours was brought along" if brought else PRETRAINING[runner.config.protocol])]


def _pretrained(path: Path | None) -> dict[str, str] | None:
    return None if path is None else {"name": path.name, "sha256": sha256(resolve_path(path))}


def _panel(runner: Runner, panel: Panel) -> dict[str, Any]:
    evaluation = next((len(planner.splits.evaluation) for planner in panel.planners.values()), None)
    training = next((len(planner.splits.train) for planner in panel.planners.values()), None)
    from_files = panel.comparable and panel.world is not None and panel.world.is_from_files
    found: dict[str, Any] = {
        "data": public_name(_source(panel)),
        "title": _title(panel, from_files),
        "images": public_name(_source(panel)),
        "network": public_name(panel.network),
        "comparable": panel.comparable,
        "from_files": from_files,
        "training_images": training,
        "evaluation_images": evaluation,
        "attack_images": min(runner.config.attack_images, evaluation or runner.config.attack_images),
        "cells": [_cell(runner, panel, cell) for cell in panel.cells],
        "curves": [
            {
                "title": curve.title,
                "axis": curve.axis,
                "points": [
                    {"x": x, **_measured(runner, panel, recipe, "pgd-paper")} for x, recipe in curve.points.items()
                ],
            }
            for curve in panel.curves
        ],
    }
    found["together"] = together(found["cells"])
    if panel.target.kind == "time":
        found["times"] = [_time(runner, panel, cell) for cell in panel.cells]
        found["cells"] = []
    if panel.recipes:
        found["embedding"] = _embedding(runner, panel)
    return found


def _title(panel: Panel, from_files: bool) -> str:
    if not panel.comparable:
        return public_name(_source(panel))
    return f"{panel.experiment.title} (from files)" if from_files else panel.experiment.title


def _source(panel: Panel) -> str:
    return panel.world.source.name if panel.world else panel.experiment.data


def _cell(runner: Runner, panel: Panel, cell: Cell) -> dict[str, Any]:
    measured = _measured(runner, panel, cell.recipe, cell.measure)
    shared = _is_one_network(panel, cell.recipe)
    theirs = cell.paper if panel.comparable else None
    return {
        "row": cell.row,
        "column": cell.column,
        "network": str(cell.recipe),
        "measure": cell.measure,
        "measure_text": MEASURES[cell.measure],
        "in_paper": cell.measure == "pgd-paper"
        and cell.tier == 0
        and cell.column in ("none", "standard", "adversarial"),
        **measured,
        "paper": _paper(theirs),
        "agreement": _agreement(measured, theirs, shared),
    }


def _measured(runner: Runner, panel: Panel, recipe: Recipe, measure: Any) -> dict[str, Any]:
    """The runs of all seeds, their means, and why what is missing is missing."""
    runs, missing = [], {}
    for seed, planner in panel.planners.items():
        step = planner.measure(recipe, measure)
        result = runner.store.result(step)
        if result is None:
            missing[str(seed)] = runner.reason(panel, step)
            continue
        clean, robust = (Proportion(*result[name]) for name in ("clean", "robust"))
        runs.append(
            {
                "seed": seed,
                "digest": step.digest,
                "test": clean.as_dict(),
                "robust": robust.as_dict(),
                "worst_case": _proportion(result.get("worst_case")),
                "by_surrogate": {name: _proportion(share) for name, share in result.get("by_surrogate", {}).items()},
                "training": _training(runner, step),
                "mixed": runner.store.is_mixed(step),
                "toolkit_version": result.get("toolkit_version"),
                "machine": result.get("machine"),
            }
        )
    if not panel.planners:
        missing["all"] = runner.reason(panel, None)
    return {"runs": runs, "missing": missing, "means": _means(runs, _is_one_network(panel, recipe))}


def _is_one_network(panel: Panel, recipe: Recipe) -> bool:
    """Whether all seeds have the same network: one that was brought along, and not trained since."""
    networks = [planner.network_of(recipe) for planner in panel.planners.values()]
    return not any(step.kind in TRAININGS for network in networks for step in network.walk())


def _training(runner: Runner, step: Step) -> list[dict[str, Any]]:
    """How every training behind a figure went."""
    found = []
    for needed in step.walk():
        result = runner.store.result(needed) if needed.kind in TRAININGS else None
        if result is not None:
            kept = ("kept_epoch", "precision", "threads", "images", "parameters", "spent")
            found.append({"label": needed.label, **{name: result.get(name) for name in kept}})
    return found


def _means(runs: list[dict[str, Any]], one_network: bool) -> dict[str, Any]:
    if not runs:
        return {}
    means = {name: _mean(runs, name, one_network) for name in QUANTITIES}
    return {name: {"value": mean.value, "error": mean.error, "text": str(mean)} for name, mean in means.items()}


def _mean(runs: list[dict[str, Any]], name: str, one_network: bool) -> Mean:
    return Mean(tuple(Proportion(run[name]["correct"], run[name]["total"]) for run in runs), one_network)


def _paper(cell: PaperCell | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    parts: dict[str, Figure] = {"test": cell.test, "robust": cell.robust}
    return {name: {"mean": figure.mean, "error": figure.error} for name, figure in parts.items()}


def _agreement(measured: Mapping[str, Any], cell: PaperCell | None, one_network: bool) -> dict[str, Any] | None:
    if cell is None or not measured["runs"]:
        return None
    found = {name: compare(_mean(measured["runs"], name, one_network), getattr(cell, name)) for name in QUANTITIES}
    return {
        name: {
            "difference": item.difference,
            "combined_error": item.error,
            "parts": item.parts,
            "within": item.within,
            "p_value": item.p_value,
            "text": str(item),
        }
        for name, item in found.items()
    }


def together(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The figures of a table for which both sides know how trainings vary, each with its p-value; None: there is none.

    Args:
        cells: of a panel.
    """
    judged = [
        {
            **{"row": cell["row"], "column": cell["column"], "quantity": name},
            **{"within": found["within"], "p_value": found["p_value"]},
        }
        for cell in cells
        for name, found in (cell["agreement"] or {}).items()
        if found["p_value"] is not None
    ]
    if not judged:
        return None
    for one, corrected in zip(judged, holm([one["p_value"] for one in judged]), strict=True):
        one["p_corrected"] = corrected
    return {"within": sum(one["within"] for one in judged), "figures": judged}


def _time(runner: Runner, panel: Panel, cell: Cell) -> dict[str, Any]:
    """What the last training of a network took, by seed; what it starts from not counted."""
    runs, missing = [], {}
    for seed in panel.planners:
        step = panel.trained(cell, seed)
        result = runner.store.result(step)
        if result is None:
            missing[str(seed)] = runner.reason(panel, step)
        else:
            facts = {"threads": result["threads"], "machine": result.get("machine")}
            runs.append({"seed": seed, **facts, **result["spent"]})
    if not panel.planners:
        missing["all"] = runner.reason(panel, None)
    return {"row": cell.row, "runs": runs, "missing": missing}


def _embedding(runner: Runner, panel: Panel) -> dict[str, Any]:
    from toolkit.reproduce.steps import POINTS
    from toolkit.reproduce.targets import EMBEDDED_CLASS

    planner = next(iter(panel.planners.values()), None)
    facts: dict[str, Any] = {"class": EMBEDDED_CLASS, "networks": {n: str(r) for n, r in panel.recipes.items()}}
    if planner is None:
        return {**facts, "missing": runner.reason(panel, None)}
    step = planner.embed(panel.recipes, EMBEDDED_CLASS)
    result = runner.store.result(step)
    if result is None or runner.store.missing(step):
        return {**facts, "missing": runner.reason(panel, step)}
    kept = {name: result.get(name) for name in ("images", "robust", "layers", "machine")}
    return {**facts, "seed": planner.seed, **kept, "file": str(runner.store.folder(step) / POINTS)}


def _proportion(counts: list[int] | None) -> dict[str, Any] | None:
    return None if counts is None else Proportion(*counts).as_dict()
