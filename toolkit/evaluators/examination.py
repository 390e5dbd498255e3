"""The whole evidence of robustness on a set of graphs: attacks, probes, fidelity of the twin, saturation, checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.artifacts import Predictor, Split, TorchModel, derive_seed
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate
from toolkit.evaluators.evaluation import Clock, Conditions
from toolkit.evaluators.image_files import Gallery
from toolkit.evaluators.journal import Journal
from toolkit.evaluators.probes import (
    PROBED_IMAGES,
    GradientProbes,
    InputProbes,
    probe_gradients,
    probe_inputs,
)
from toolkit.evaluators.robustness import Robustness, arm, evaluate_robustness
from toolkit.evaluators.scoring import SurrogateName, TargetName, primary_of
from toolkit.evaluators.soundness import (
    Check,
    disagreement_under_attack,
    gradient_checks,
    input_checks,
    integer_above_float,
    query_beats_gradient,
    unfaithful_surrogate,
)
from toolkit.evaluators.surrogate import Fidelity, Twin, measure_fidelity, saturation

FIDELITY_STREAM = 3000
"""Seeds of the attacks on which fidelity is measured are apart from the others."""


@dataclass(frozen=True, slots=True)
class Saturation:
    """Share of a quantised tensor's values outside of what its quantiser represents."""

    tensor: str
    clean: float
    attacked: float


@dataclass(frozen=True)
class Examination:
    """Everything that is known of the robustness of a set of graphs."""

    robustness: Robustness
    fidelity: Fidelity | None
    """Of the deployed graph's twin; None where there is none."""
    saturation: tuple[Saturation, ...]
    gradients: GradientProbes | None
    """None without a surrogate, where the time did not suffice, or not wanted."""
    inputs: InputProbes
    checks: tuple[Check, ...]
    not_run: tuple[str, ...]
    """What the time did not suffice for, and attacks with gradients where there is no network to make them on."""

    @property
    def alarms(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.alarming)


def examine(
    surrogates: Mapping[SurrogateName, TorchModel],
    targets: Mapping[TargetName, Predictor],
    split: Split,
    conditions: Conditions,
    *,
    twin: Twin | None = None,
    journal: Journal | None = None,
    clock: Clock | None = None,
    gallery: Gallery | None = None,
) -> Examination:
    """Attack, probe and check.

    Args:
        surrogates, targets, split, conditions, journal, clock, gallery: as in `evaluate_robustness`.
        twin: of the deployed graph, if it stands among the surrogates.
    """
    clock = clock or Clock()
    robustness = evaluate_robustness(
        surrogates, targets, split, conditions, journal=journal, clock=clock, gallery=gallery
    )
    primary = targets[primary_of(targets)]
    inputs = probe_inputs(primary, split)
    fidelity: Fidelity | None = None
    saturated: tuple[Saturation, ...] = ()
    gradients: GradientProbes | None = None
    not_run = robustness.not_run
    if twin is not None and clock.expired:
        not_run = (*not_run, "fidelity of the twin, saturation")
    elif twin is not None:
        fidelity, saturated = _watch_twin(twin, surrogates["twin"], primary, split, conditions)
    best = robustness.best_surrogate
    if surrogates and conditions.probes and clock.expired:
        not_run = (*not_run, "probes of steps and radii")
    elif best is not None and conditions.probes:
        surrogate = arm({best: surrogates[best]}, conditions)[best]
        gradients = probe_gradients(surrogate, primary, split, conditions)
    checks = (
        *input_checks(inputs),
        *integer_above_float(robustness.worst_case),
        *(query_beats_gradient(robustness.passes, len(split)) if surrogates else ()),
        *disagreement_under_attack(robustness.columns, robustness.clean_test, len(split)),
        *(gradient_checks(gradients, inputs.majority) if gradients else ()),
        *(unfaithful_surrogate("twin", fidelity) if fidelity else ()),
    )
    return Examination(robustness, fidelity, saturated, gradients, inputs, checks, not_run)


def _watch_twin(
    twin: Twin, model: TorchModel, deployed: Predictor, split: Split, conditions: Conditions
) -> tuple[Fidelity, tuple[Saturation, ...]]:
    """How faithful the twin is, and what its quantisers clip, on clean images and on images attacked on it."""
    probed = split.first(PROBED_IMAGES)
    clean = [batch.images for batch in probed.batches()]
    attacked = list(_attacked(arm({"twin": model}, conditions)["twin"], probed, conditions))
    fidelity = measure_fidelity(twin, deployed, clean, attacked)
    before, after = saturation(twin, clean), saturation(twin, attacked)
    return fidelity, tuple(Saturation(name, before[name], after[name]) for name in before)


def _attacked(surrogate: Surrogate, probed: Split, conditions: Conditions) -> Iterator[Tensor]:
    for number, batch in enumerate(probed.batches()):
        generator = torch.Generator().manual_seed(derive_seed(conditions.seed, FIDELITY_STREAM, number))
        yield pgd(surrogate, batch.images, batch.labels, conditions.plan, generator).cpu()
