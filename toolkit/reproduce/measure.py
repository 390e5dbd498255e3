"""Measuring a network: accuracy on clean images, and on attacked ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.artifacts import OnnxModel, Predictor, Proportion, TorchModel
from toolkit.attacks.deepfool import deepfool
from toolkit.attacks.ensemble import compose
from toolkit.attacks.surrogate import Surrogate
from toolkit.evaluators.accuracy import measure_accuracy
from toolkit.evaluators.evaluation import Conditions
from toolkit.evaluators.journal import Journal
from toolkit.evaluators.robustness import Robustness, evaluate_robustness
from toolkit.evaluators.saturation_emulation import twin_of_session
from toolkit.evaluators.scoring import Judges, SurrogateName, TargetName, primary_of
from toolkit.evaluators.surrogate import twin_model
from toolkit.exporters.session import OnnxPredictor
from toolkit.reproduce.steps import INTEGER_GRAPH, Step
from toolkit.reproduce.work import Bench, read_plan

JOURNAL = "journal.sqlite"
Surrogates = dict[SurrogateName, TorchModel]
OWN: dict[str, SurrogateName] = {
    "float": "float",
    "simulated": "fake_quantised",
    "qat": "fake_quantised",
    "integer": "twin",
}
"""The network on which the attack of the paper's kind is made, by form: the judged one itself, or its twin."""


def do_measuring(step: Step, bench: Bench) -> dict[str, Any]:
    """Attack a network, simulated or real, on the evaluation images."""
    settings = step.settings
    plan = read_plan(settings["plan"])
    assert plan is not None  # every measure has one
    split = bench.splits.evaluation.first(settings["evaluation"][0])
    surrogates, targets = _lineup(step, bench)
    if settings["measure"].startswith("deepfool"):
        target = targets[primary_of(targets)]
        robust = _deepfool(step, bench, surrogates[OWN[settings["form"]]], target)
        return _shares(clean=measure_accuracy(target, split), robust=robust)
    ensemble = settings["measure"].startswith("autoattack")
    classes = len(bench.world.source.train.class_names)
    conditions = Conditions(
        plan,
        bench.world.source.normalization_hint,
        settings["seed"],
        passes=compose("ensemble", classes, plan.threat.norm) if ensemble else (),
    )
    journal = Journal(bench.file(step, JOURNAL), step.digest, resume=True)
    try:
        found = evaluate_robustness(surrogates, targets, split, conditions, journal=journal)
    except BaseException:
        journal.close()
        raise
    journal.close(discard=True)
    return _result(found, primary_of(targets), OWN[settings["form"]], worst_counts=ensemble)


def _lineup(step: Step, bench: Bench) -> tuple[Surrogates, dict[TargetName, Predictor]]:
    """The networks that are attacked, and what is judged.

    Attacks on an integer graph are made on its twin, on its simulated form and on the float network; those on a network
    that was trained to be rounded on it and on the float network, because few bits mask its gradients.
    """
    form, network = step.settings["form"], step.parents[0]
    if form == "float":
        model = bench.model(network)
        return {"float": model}, {"torch": model}
    simulated = bench.simulated(network, step.settings)
    if form == "simulated":
        return {"fake_quantised": simulated}, {"torch": simulated}
    if form == "qat":
        return {"fake_quantised": simulated, "float": bench.model(network)}, {"torch": simulated}
    path = bench.file(step.parents[1], INTEGER_GRAPH)
    twin = twin_model(twin_of_session(path), bench.world.source.train.class_names)
    surrogates: Surrogates = {"twin": twin, "fake_quantised": simulated, "float": bench.model(network)}
    return surrogates, {"deployed": OnnxPredictor(OnnxModel(path, "deployed").path)}


def _result(found: Robustness, target: TargetName, own: SurrogateName, *, worst_counts: bool) -> dict[str, Any]:
    by_surrogate = {cell.surrogate: cell.robust for cell in found.transfers if cell.target == target}
    worst = found.worst_case[target]
    shares = _shares(
        clean=found.clean[target],
        robust=worst if worst_counts else by_surrogate[own],
        worst_case=worst,
    )
    return {
        **shares,
        "by_surrogate": _shares(**by_surrogate),
        "passes": [[record.attack, record.steps, record.attempted, record.fooled] for record in found.passes],
    }


def _deepfool(step: Step, bench: Bench, model: TorchModel, target: Predictor) -> Proportion:
    """Share of images that the target classifies rightly, clean and at every point in the ball that DeepFool tries."""
    plan = read_plan(step.settings["plan"])
    assert plan is not None  # as above
    normalization = bench.world.source.normalization_hint
    judges = Judges({"torch": target}, plan.threat, normalization, files=False)
    surrogate = Surrogate(model.module, normalization, "float32", input_shape=model.spec.input_shape)
    standing: list[Tensor] = []
    position = 0
    for batch in bench.splits.evaluation.first(step.settings["evaluation"][0]).batches():
        indices = np.arange(position, position + len(batch), dtype=np.int64)
        clean = judges.score(batch.images, batch.images, batch.labels, indices=indices, every=False)["torch"].clone()

        def settle(attacked: Tensor, rows: Tensor, *, batch: Any = batch, flags: Tensor = clean) -> Tensor:
            rows = rows.cpu()
            right = judges.score(attacked, batch.images[rows], batch.labels[rows], indices=rows.numpy(), every=False)[
                "torch"
            ]
            flags[rows[~right]] = False
            return ~right

        deepfool(surrogate, batch.images, batch.labels, plan.threat, settle=settle)
        standing.append(clean)
        position += len(batch)
    return Proportion.of(torch.cat(standing))


def _shares(**found: Proportion) -> dict[str, Any]:
    return {name: [share.correct, share.total] for name, share in found.items()}
