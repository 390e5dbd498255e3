"""Robust accuracy: attacks made on differentiable surrogates, scored on every graph that counts.

Two kinds of evidence. The transfer matrix attacks all images with all steps on every surrogate: stopping early once the
surrogate is fooled would leave the other graphs with weaker attacks and inflate their figures. The worst case then goes
on, from cheap attacks to dear ones: every compared graph has each of them made for it, on the surrogate that transfers
to it best, on the images that it still classifies rightly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from toolkit.artifacts import Predictor, Proportion, Split, TorchModel
from toolkit.attacks.forms import Precision
from toolkit.attacks.surrogate import Surrogate, resolve_precision
from toolkit.evaluators.evaluation import Clock, Conditions, Evaluation
from toolkit.evaluators.image_files import WRITABLE_CHANNELS, Gallery
from toolkit.evaluators.journal import Journal
from toolkit.evaluators.scoring import FILE, Judges, Ledger, SurrogateName, TargetName, clean_flags
from toolkit.evaluators.transfer import ColumnTest, Transfer, transfer_matrix
from toolkit.evaluators.worst_case import PassRecord, pursue
from toolkit.progress import task
from toolkit.statistics import Mcnemar, mcnemar


@dataclass(frozen=True)
class Robustness:
    """What all graphs have left under the same attacks on the same images."""

    transfers: tuple[Transfer, ...]
    columns: tuple[ColumnTest, ...]
    clean: Mapping[str, Proportion]
    clean_test: Mcnemar | None
    """Whether the float twin and the deployed graph differ on clean images; None where one is missing."""
    worst_case: Mapping[str, Proportion]
    """By compared graph: share of images right when clean and under every attack."""
    file: Proportion | None
    """The same of the graph that counts, reading the attacked images from 8-bit files; None for other than 1 or 3
    channels."""
    passes: tuple[PassRecord, ...]
    not_run: tuple[str, ...]
    """What the time did not suffice for, and attacks with gradients where there is no network to make them on."""
    clipped_share: float | None
    """Share of attacked pixels outside the range of the deployed graph's input quantiser; None if it was not asked."""
    best_surrogate: SurrogateName | None
    """On which the attack that fools the graph that counts most was made; None without any."""


def evaluate_robustness(
    surrogates: Mapping[SurrogateName, TorchModel],
    targets: Mapping[TargetName, Predictor],
    split: Split,
    conditions: Conditions,
    *,
    journal: Journal | None = None,
    clock: Clock | None = None,
    gallery: Gallery | None = None,
) -> Robustness:
    """Attack every surrogate, and score the attacked images, in float32, on every target.

    Args:
        surrogates: the differentiable networks by name; may be empty, where only attacks by queries are possible.
        targets: the graphs to be judged, by name.
        split: the evaluation images, all of which are attacked.
        conditions: threat model, attacks, seed.
        journal: keeps what is done, and gives what an earlier run did.
        clock: the time that may be spent; clean accuracy is measured in any case.
        gallery: keeps the files that fool the graph that counts.
    """
    gallery = gallery or Gallery(None)
    judges = Judges(targets, conditions.plan.threat, conditions.normalization, gallery)
    with task("clean accuracy", len(split)) as bar:
        clean = clean_flags(judges, split, bar.advance)
    gallery.leave_out((~clean[judges.primary]).nonzero()[:, 0].tolist())
    ledger = Ledger(clean, judges, files=split.images.shape[0] in WRITABLE_CHANNELS, keep_near=conditions.keep_near)
    run = Evaluation(judges, ledger, split, conditions, journal or Journal(), clock or Clock())
    armed = arm(surrogates, conditions)
    matrix = transfer_matrix(surrogates, armed, run)
    passes, late = pursue(armed, matrix.best, run)
    worst = ledger.proportions()
    return Robustness(
        transfers=matrix.transfers,
        columns=matrix.columns,
        clean={name: Proportion.of(clean[name]) for name in targets},
        clean_test=mcnemar(clean["fp32"], clean["deployed"]) if {"fp32", "deployed"} <= set(clean) else None,
        worst_case={name: share for name, share in worst.items() if name != FILE},
        file=worst.get(FILE),
        passes=passes,
        not_run=(*matrix.not_run, *late),
        clipped_share=matrix.clipped_share,
        best_surrogate=matrix.best[judges.primary][0] if matrix.best else None,
    )


def arm(surrogates: Mapping[SurrogateName, TorchModel], conditions: Conditions) -> dict[SurrogateName, Surrogate]:
    """The surrogates, ready for attacks; those that round keep their weights in float32."""
    wanted = resolve_precision(conditions.precision)
    rounding: Precision = "autocast" if wanted == "bfloat16" else wanted
    return {
        name: Surrogate(
            model.module,
            conditions.normalization,
            rounding if name in ("fake_quantised", "twin") else wanted,
            input_shape=model.spec.input_shape,
        )
        for name, model in surrogates.items()
    }
