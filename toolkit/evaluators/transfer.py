"""The transfer matrix: one attack on every surrogate, all steps on all images, scored on every target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from toolkit.artifacts import Int64Array, Predictor, Proportion, TorchModel, derive_seed
from toolkit.attacks.ensemble import PGD
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate
from toolkit.evaluators.accuracy import correct
from toolkit.evaluators.evaluation import NO_NETWORK, Evaluation
from toolkit.evaluators.scoring import MARGIN, Flags, SurrogateName, TargetName, placed
from toolkit.progress import task
from toolkit.statistics import Mcnemar, mcnemar

CLEAN = "clean"
"""The surrogate's own network on clean images."""
OWN = "surrogate"
"""The judge's name of the surrogate's own network."""
CLIPPED = "clipped"
OWN_FORM: Mapping[TargetName, SurrogateName] = {"torch": "float", "fp32": "float", "deployed": "twin"}
"""The surrogate that computes what the graph computes."""
COLUMNS: tuple[TargetName, ...] = ("torch", "fp32", "deployed", "deployed_unoptimised")


@dataclass(frozen=True, slots=True)
class Transfer:
    """One attack made on `surrogate` and scored on `target`."""

    attack: str
    surrogate: SurrogateName
    target: TargetName
    robust: Proportion
    """Images that the target still classifies rightly under the attack, of all images."""
    transfer_rate: Proportion | None
    """Of the images clean-correct on both and fooled on the surrogate, the share that fools the target too."""


@dataclass(frozen=True, slots=True)
class ColumnTest:
    """Whether two targets differ under one attack on the same images."""

    attack: str
    surrogate: SurrogateName
    first: TargetName
    second: TargetName
    test: Mcnemar


@dataclass(frozen=True)
class Matrix:
    """All cells that were finished."""

    transfers: tuple[Transfer, ...]
    columns: tuple[ColumnTest, ...]
    clipped_share: float | None
    best: Mapping[TargetName, tuple[SurrogateName, ...]]
    """By compared graph: the surrogate whose attack fools it most, and after it the graph's own form; empty if no row
    was finished."""
    not_run: tuple[str, ...]


@dataclass
class _Row:
    """One surrogate's flags, chunk by chunk."""

    clean: list[Tensor] = field(default_factory=list)
    attacked: dict[str, list[Tensor]] = field(default_factory=dict)
    clipped: int = 0

    def add(self, found: Mapping[str, Tensor]) -> None:
        self.clean.append(found[CLEAN].bool())
        self.clipped += int(found[CLIPPED])
        for name, flags in found.items():
            if name not in (CLEAN, CLIPPED) and not name.startswith(MARGIN):
                self.attacked.setdefault(name, []).append(flags.bool())

    def flags(self) -> Flags:
        return {name: torch.cat(parts) for name, parts in self.attacked.items()}


def transfer_matrix(
    models: Mapping[SurrogateName, TorchModel], armed: Mapping[SurrogateName, Surrogate], run: Evaluation
) -> Matrix:
    """Attack every surrogate by the plan's PGD and score the images on every target; what is found goes to the ledger.

    Args:
        models: the surrogates as networks, which say in float32 whether they are fooled.
        armed: the same, ready for attacks.
        run: the evaluation.
    """
    rows: dict[SurrogateName, _Row] = {}
    not_run = [] if armed else [f"{_name(run)}: {NO_NETWORK}"]
    for number, name in enumerate(armed):
        row = _one_row(name, models[name], armed[name], number, run)
        if row is None:
            not_run.append(f"{_name(run)} on {name}")
        else:
            rows[name] = row
    return _matrix(rows, run, tuple(not_run))


def _name(run: Evaluation) -> str:
    return f"{PGD}-{run.conditions.plan.steps}"


def _one_row(name: SurrogateName, model: TorchModel, surrogate: Surrogate, number: int, run: Evaluation) -> _Row | None:
    """All images attacked on one surrogate; None if the time did not suffice."""
    row, restarts = _Row(), run.conditions.plan.restarts
    own = placed(model)
    with task(f"{_name(run)} on {name}", len(run.split) * restarts) as bar:
        for chunk, indices in enumerate(run.chunks(np.arange(len(run.split)))):
            key = f"matrix/{name}/{chunk}"
            known = run.journal.get(key)
            if known is None:
                if run.clock.expired:
                    return None
                flags = _one_cell(own, surrogate, (number, chunk), indices, run)
                run.journal.put(key, {judge: values.numpy() for judge, values in flags.items()})
            else:
                flags = {judge: torch.from_numpy(values) for judge, values in known.items()}
            row.add(flags)
            run.ledger.update(flags, indices)
            bar.advance(len(indices) * restarts)
    return row


def _one_cell(
    own: Predictor, surrogate: Surrogate, numbers: tuple[int, int], indices: Int64Array, run: Evaluation
) -> Flags:
    """The flags of every judge for one chunk; of several restarts the worst one counts for every judge on its own."""
    conditions, batch = run.conditions, run.split.take(indices)
    flags: Flags = {}
    clipped = 0
    for restart in range(conditions.plan.restarts):
        generator = torch.Generator().manual_seed(derive_seed(conditions.seed, *numbers, restart))
        attacked = pgd(surrogate, batch.images, batch.labels, conditions.plan, generator).cpu()
        found = run.judges.score(attacked, batch.images, batch.labels, indices=indices, every=True)
        found[OWN] = correct(own, attacked, batch.labels)
        flags = {
            judge: values if judge not in flags else _worse(judge, values, flags[judge])
            for judge, values in found.items()
        }
        if conditions.input_range is not None:
            low, high = conditions.input_range
            clipped += int(((attacked < low) | (attacked > high)).sum())
    clean = correct(own, batch.images, batch.labels)
    return {**flags, CLEAN: clean, CLIPPED: torch.tensor([clipped])}


def _worse(judge: str, first: Tensor, second: Tensor) -> Tensor:
    """Of two restarts, image by image: right only if right in both, and the larger margin."""
    return torch.maximum(first, second) if judge.startswith(MARGIN) else first & second


def _matrix(rows: Mapping[SurrogateName, _Row], run: Evaluation, not_run: tuple[str, ...]) -> Matrix:
    transfers: list[Transfer] = []
    columns: list[ColumnTest] = []
    standing: dict[TargetName, dict[SurrogateName, Tensor]] = {graph: {} for graph in run.judges.compared}
    for name, row in rows.items():
        flags, clean = row.flags(), torch.cat(row.clean)
        targets = [target for target in COLUMNS if target in flags]
        for target in targets:
            eligible = clean & run.ledger.clean[target] & ~flags[OWN]
            rate = Proportion.of(~flags[target][eligible]) if bool(eligible.any()) else None
            transfers.append(Transfer(_name(run), name, target, Proportion.of(flags[target]), rate))
        columns += [
            ColumnTest(_name(run), name, first, second, mcnemar(flags[first], flags[second]))
            for first, second in pairwise(targets)
        ]
        for graph, left in standing.items():
            left[name] = flags[graph] & run.ledger.clean[graph]
    clipped = None
    if run.conditions.input_range is not None and rows:
        pixels = len(run.split) * math.prod(run.split.images.shape) * run.conditions.plan.restarts
        clipped = next(iter(rows.values())).clipped / pixels
    best = {graph: _best(graph, left) for graph, left in standing.items() if left}
    return Matrix(tuple(transfers), tuple(columns), clipped, best, not_run)


def _best(graph: TargetName, left: Mapping[SurrogateName, Tensor]) -> tuple[SurrogateName, ...]:
    """The surrogate under whose attack fewest images are left of a graph, and its own form.

    Beside the boundary another form misleads, however it fares in the matrix: what is compared is attacked alike.
    """
    strongest = min(left, key=lambda name: int(left[name].sum()))
    own = OWN_FORM.get(graph, strongest)
    return (strongest,) if own == strongest or own not in left else (strongest, own)
