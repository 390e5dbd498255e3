"""Measuring a network: accuracy on clean images, and on attacked ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.artifacts import Batch, OnnxModel, Predictor, Proportion, Split, TorchModel
from toolkit.attacks.deepfool import deepfool
from toolkit.attacks.ensemble import compose
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.evaluators.accuracy import measure_accuracy
from toolkit.evaluators.evaluation import Conditions
from toolkit.evaluators.journal import Journal
from toolkit.evaluators.robustness import Robustness, evaluate_robustness
from toolkit.evaluators.saturation_emulation import twin_of_session
from toolkit.evaluators.scoring import Judges, SurrogateName, TargetName, primary_of
from toolkit.evaluators.surrogate import twin_model
from toolkit.exporters.session import OnnxPredictor
from toolkit.progress import task
from toolkit.reproduce.steps import Step
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
    journal = Journal(bench.file(step, JOURNAL), _fingerprint(step, bench), resume="or anew")
    try:
        found = _attacked(step, bench, surrogates, targets, plan, split, journal)
    except BaseException:
        journal.close()
        raise
    journal.close(discard=True)
    return found


def _fingerprint(step: Step, bench: Bench) -> str:
    """Of the step and of the very networks: one that was made again may have come out otherwise."""
    return "/".join([step.digest, *(str(bench.store.weights(parent)) for parent in step.parents)])


def _attacked(
    step: Step,
    bench: Bench,
    surrogates: Surrogates,
    targets: Mapping[TargetName, Predictor],
    plan: PgdPlan,
    split: Split,
    journal: Journal,
) -> dict[str, Any]:
    settings = step.settings
    if settings["measure"].startswith("deepfool"):
        target = targets[primary_of(targets)]
        robust = _deepfool(bench, surrogates[OWN[settings["form"]]], target, plan, split, journal)
        return _shares(clean=measure_accuracy(target, split), robust=robust)
    ensemble = settings["measure"].startswith("autoattack")
    classes = len(bench.world.source.train.class_names)
    conditions = Conditions(
        plan,
        bench.world.source.normalization_hint,
        settings["seed"],
        passes=compose("ensemble", classes, plan.threat.norm) if ensemble else (),
    )
    found = evaluate_robustness(surrogates, targets, split, conditions, journal=journal)
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
    path = bench.graph(step.parents[1])
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


def _deepfool(
    bench: Bench, model: TorchModel, target: Predictor, plan: PgdPlan, split: Split, journal: Journal
) -> Proportion:
    """Share of images that the target classifies rightly, clean and at every point in the ball that DeepFool tries."""
    normalization = bench.world.source.normalization_hint
    judges = Judges({"torch": target}, plan.threat, normalization, files=False)
    surrogate = Surrogate(model.module, normalization, "float32", input_shape=model.spec.input_shape)
    standing: list[Tensor] = []
    position = 0
    with task("DeepFool", len(split)) as bar:
        for batch in split.batches():
            key = f"deepfool/{position}"
            known = journal.get(key)
            if known is None:
                flags = _stands(surrogate, judges, batch, position, plan.threat)
                journal.put(key, {"standing": flags.numpy()})
            else:
                flags = torch.from_numpy(known["standing"])
            standing.append(flags)
            position += len(batch)
            bar.advance(len(batch))
    return Proportion.of(torch.cat(standing))


def _stands(surrogate: Surrogate, judges: Judges, batch: Batch, position: int, threat: ThreatModel) -> Tensor:
    """Which images of a batch, the first of which is at `position` of all, DeepFool leaves right."""
    indices = np.arange(position, position + len(batch), dtype=np.int64)

    def right(images: Tensor, rows: Tensor) -> Tensor:
        clean, labels = batch.images[rows], batch.labels[rows]
        return judges.score(images, clean, labels, indices=indices[rows.numpy()], every=False)["torch"]

    flags = right(batch.images, torch.arange(len(batch))).clone()

    def settle(attacked: Tensor, positions: Tensor) -> Tensor:
        rows = positions.cpu()
        kept = right(attacked, rows)
        flags[rows[~kept]] = False
        return ~kept

    deepfool(surrogate, batch.images, batch.labels, threat, settle=settle)
    return flags


def _shares(**found: Proportion) -> dict[str, Any]:
    return {name: [share.correct, share.total] for name, share in found.items()}
