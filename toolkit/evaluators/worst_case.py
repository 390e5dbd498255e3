"""The worst case per image: attack after attack, from cheap to dear, on the images that still stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.artifacts import Batch, Int64Array, Predictor, derive_seed
from toolkit.attacks.ensemble import Pass
from toolkit.attacks.square import square
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.survivors import Settle
from toolkit.evaluators.evaluation import Evaluation
from toolkit.evaluators.scoring import MARGIN, SurrogateName
from toolkit.progress import task

FIRST_STREAM = 1000
"""Seeds of passes are apart from those of the transfer matrix."""


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What one attack came to."""

    attack: str
    steps: int
    rank: int | None
    surrogate: SurrogateName | None
    """None for an attack by queries: it runs on the graph that counts itself."""
    attempted: int
    """Images that some compared graph still classified rightly before it."""
    fooled: int
    """Of these, those that fool the graph that counts now, and did not before."""


@dataclass(frozen=True)
class _Attempt:
    """One pass on one surrogate, or on the graph that counts."""

    how: Pass
    name: SurrogateName | None
    surrogate: Surrogate | None
    searched: Predictor
    """What a search by queries asks: the graph that counts, or the fast form of the same torch network."""
    number: int

    def __str__(self) -> str:
        return f"{self.how} on {self.name or 'the graph itself'}"


def pursue(
    armed: Mapping[SurrogateName, Surrogate], best: SurrogateName | None, run: Evaluation
) -> tuple[tuple[PassRecord, ...], tuple[str, ...]]:
    """Run all passes on what is left, and keep the ledger.

    Args:
        armed: the surrogates, ready for attacks.
        best: the one on which passes are made that need only one; None if there are none.
        run: the evaluation.

    Returns:
        What every pass came to, and what the time did not suffice for.
    """
    records: list[PassRecord] = []
    not_run: list[str] = []
    ledger, primary = run.ledger, run.judges.primary
    searched = armed["float"] if primary == "torch" and "float" in armed else run.judges.targets[primary]
    for number, (how, name) in enumerate(_planned(run.conditions.passes, armed, best)):
        attempt = _Attempt(how, name, armed[name] if name else None, searched, number)
        remaining = ledger.remaining(how.near)
        before = ledger.worst[primary].clone()
        done = 0
        with task(str(attempt), len(remaining)) as bar:
            for chunk, indices in enumerate(run.chunks(remaining)):
                if not _one_chunk(attempt, chunk, indices, run):
                    not_run.append(f"{attempt}: {len(remaining) - done} of {len(remaining)} images")
                    break
                done += len(indices)
                bar.advance(len(indices), f"{ledger.worst[primary].float().mean():.1%} robust so far")
        if done:
            fooled = int((before & ~ledger.worst[primary]).sum())
            records.append(PassRecord(how.attack, how.steps, how.rank, name, done, fooled))
    return tuple(records), tuple(not_run)


def _planned(
    passes: tuple[Pass, ...], armed: Mapping[SurrogateName, Surrogate], best: SurrogateName | None
) -> list[tuple[Pass, SurrogateName | None]]:
    """Attacks by queries come last, so that they show what those with gradients have missed."""
    planned: list[tuple[Pass, SurrogateName | None]] = []
    for how in sorted(passes, key=lambda how: how.by_queries):
        if how.by_queries:
            planned.append((how, None))
        elif how.everywhere:
            planned += [(how, name) for name in armed]
        elif best is not None:
            planned.append((how, best))
    return planned


def _one_chunk(attempt: _Attempt, chunk: int, indices: Int64Array, run: Evaluation) -> bool:
    """Attack one chunk, or take it from the journal; False if there is no time left."""
    key = f"pass/{attempt.number}/{attempt}/{chunk}"
    known = run.journal.get(key)
    if known is not None:
        run.ledger.update({judge: torch.from_numpy(flags) for judge, flags in known.items()}, indices)
        return True
    if run.clock.expired:
        return False
    _attack(attempt, chunk, indices, run)
    known = {judge: flags[indices].numpy() for judge, flags in run.ledger.worst.items()}
    run.journal.put(key, {**known, MARGIN: run.ledger.margin[indices].numpy()})
    return True


def _attack(attempt: _Attempt, chunk: int, indices: Int64Array, run: Evaluation) -> None:
    """What fools a judge is in the ledger when this returns."""
    conditions, batch = run.conditions, run.split.take(indices)
    threat, images, labels = conditions.plan.threat, batch.images, batch.labels
    generator = torch.Generator().manual_seed(derive_seed(conditions.seed, FIRST_STREAM + attempt.number, chunk))
    settle = _settle(batch, indices, run)
    if attempt.surrogate is not None:
        attempt.how.run(attempt.surrogate, images, labels, threat, generator, settle)
        return
    square(
        attempt.searched,
        images,
        labels,
        threat,
        conditions.normalization,
        queries=attempt.how.steps,
        generator=generator,
        settle=settle,
    )


def _settle(batch: Batch, indices: Int64Array, run: Evaluation) -> Settle:
    """Judge attacked images, and say of which no compared judge is right any more."""

    def settle(attacked: Tensor, positions: Tensor) -> Tensor:
        rows = positions.cpu()
        chosen = indices[rows.numpy()]
        flags = run.judges.score(attacked, batch.images[rows], batch.labels[rows], indices=chosen, every=False)
        run.ledger.update(flags, chosen)
        return ~run.ledger.undecided(chosen)

    return settle
