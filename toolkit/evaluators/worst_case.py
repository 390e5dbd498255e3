"""The worst case per image: attack after attack, from cheap to dear, on the images that still stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolkit.artifacts import Batch, Int64Array, Predictor, derive_seed
from toolkit.attacks.ensemble import QUERIES, Pass
from toolkit.attacks.square import square
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.survivors import Settle
from toolkit.evaluators.evaluation import NO_NETWORK, Evaluation
from toolkit.evaluators.scoring import SurrogateName, TargetName
from toolkit.progress import task

FIRST_STREAM = 1000
"""Seeds of passes are apart from those of the transfer matrix."""


MASKED_SHARE, MASKED_FEWEST = 0.005, 3
"""So many images a search by queries may fool after all gradient attacks; more show that gradients are masked."""


@dataclass(frozen=True, slots=True)
class PassRecord:
    """What one attack came to."""

    attack: str
    steps: int
    ranks: tuple[int, ...]
    surrogate: SurrogateName | None
    """None for an attack by queries: it asks the graph itself."""
    graphs: tuple[TargetName, ...]
    """For which it was made."""
    attempted: int
    """Images it was made on: those that still stood on one of these, and were near enough to its boundary."""
    fooled: int
    """Of these, those that fool the first of the graphs now, and did not before."""
    onward: bool = False
    """From where the attacks before it were stuck."""
    starts: int = 1
    """Random starts, side by side."""


@dataclass(frozen=True)
class _Attempt:
    """One pass on one surrogate, or by queries to a graph."""

    how: Pass
    name: SurrogateName | None
    graphs: tuple[TargetName, ...]
    """For which it is made, the most important first."""
    number: int

    def __str__(self) -> str:
        return f"{self.how} on {self.name or self.graphs[0]}"


def pursue(
    armed: Mapping[SurrogateName, Surrogate], best: Mapping[TargetName, tuple[SurrogateName, ...]], run: Evaluation
) -> tuple[tuple[PassRecord, ...], tuple[str, ...]]:
    """Run all passes on what is left, and keep the ledger.

    Args:
        armed: the surrogates, ready for attacks.
        best: for every compared graph those that transfer to it best; where none is known, the first is taken.
        run: the evaluation.

    Returns:
        What every pass came to, and what was not run.
    """
    records: list[PassRecord] = []
    not_run = [] if armed else [f"{how}: {NO_NETWORK}" for how in run.conditions.passes if not how.by_queries]
    ledger = run.ledger
    for attempt in _planned(armed, best, run):
        how, graph = attempt.how, attempt.graphs[0]
        if how.where_masked and not masked(records, graph, len(run.split)):
            continue
        remaining = ledger.remaining(attempt.graphs, how.near)
        before = ledger.worst[graph].clone()
        done = 0
        with task(str(attempt), len(remaining)) as bar:
            for chunk, indices in enumerate(run.chunks(remaining, how.copies)):
                if not _one_chunk(attempt, armed, chunk, indices, run):
                    not_run.append(f"{attempt}: {len(remaining) - done} of {len(remaining)} images")
                    break
                done += len(indices)
                bar.advance(len(indices), f"{ledger.worst[graph].float().mean():.1%} robust so far")
        if done:
            fooled = int((before & ~ledger.worst[graph]).sum())
            records.append(
                PassRecord(
                    how.attack,
                    how.steps,
                    how.ranks,
                    attempt.name,
                    attempt.graphs,
                    done,
                    fooled,
                    onward=how.onward,
                    starts=how.starts,
                )
            )
    return tuple(records), tuple(not_run)


def found_by_queries(records: Iterable[PassRecord]) -> dict[TargetName, int]:
    """How many images searches by queries fooled on every graph that gradient attacks should have.

    A search that goes on where they are stuck owes them most of the way, and does not count.
    """
    found: dict[TargetName, int] = {}
    for how in records:
        if how.surrogate is None and not how.onward:
            found[how.graphs[0]] = found.get(how.graphs[0], 0) + how.fooled
    return found


def masked(records: Iterable[PassRecord], graph: TargetName, images: int) -> bool:
    """Whether so many are more than chance, so that gradients mislead and say nothing of which images are near."""
    return found_by_queries(records).get(graph, 0) > max(MASKED_FEWEST, MASKED_SHARE * images)


def _planned(
    armed: Mapping[SurrogateName, Surrogate], best: Mapping[TargetName, tuple[SurrogateName, ...]], run: Evaluation
) -> list[_Attempt]:
    """Attacks by queries come last, so that they show what those with gradients have missed; alone they are whole."""
    primary = run.judges.primary
    graphs = (primary, *(graph for graph in run.judges.compared if graph != primary))
    chosen: dict[SurrogateName, tuple[TargetName, ...]] = {}
    for graph in graphs if armed else ():
        for made_on in best.get(graph) or (next(iter(armed)),):
            chosen[made_on] = (*chosen.get(made_on, ()), graph)
    planned: list[tuple[Pass, SurrogateName | None, tuple[TargetName, ...]]] = []
    for how in sorted(run.conditions.passes, key=lambda how: how.by_queries):
        if how.where_masked and not armed:
            continue  # alone, searches by queries are whole
        if how.by_queries:
            whole = replace(how, steps=max(how.steps, QUERIES)) if not armed and not how.near else how
            planned += [(whole, None, (graph,)) for graph in graphs]
        elif how.everywhere:
            planned += [(how, name, graphs) for name in armed]
        else:
            planned += [(how, name, served) for name, served in chosen.items()]
    return [_Attempt(*parts, number) for number, parts in enumerate(planned)]


def _one_chunk(
    attempt: _Attempt, armed: Mapping[SurrogateName, Surrogate], chunk: int, indices: Int64Array, run: Evaluation
) -> bool:
    """Attack one chunk, or take it from the journal; False if there is no time left."""
    key = f"pass/{attempt.number}/{attempt}/{chunk}"
    known = run.journal.get(key)
    if known is not None:
        run.ledger.restore(known, indices)
        return True
    if run.clock.expired:
        return False
    _attack(attempt, armed, chunk, indices, run)
    run.journal.put(key, run.ledger.state(indices))
    return True


def _attack(
    attempt: _Attempt, armed: Mapping[SurrogateName, Surrogate], chunk: int, indices: Int64Array, run: Evaluation
) -> None:
    """What fools a judge is in the ledger when this returns."""
    conditions, batch = run.conditions, run.split.take(indices)
    threat, images, labels = conditions.plan.threat, batch.images, batch.labels
    generator = torch.Generator().manual_seed(derive_seed(conditions.seed, FIRST_STREAM + attempt.number, chunk))
    settle = _settle(attempt, batch, indices, run)
    start = run.ledger.nearest(attempt.graphs, indices, images) if attempt.how.onward else None
    if attempt.name is not None:
        attempt.how.run(armed[attempt.name], images, labels, threat, generator, settle, start=start)
        return
    square(
        _searched(attempt, armed, run),
        images,
        labels,
        threat,
        conditions.normalization,
        queries=attempt.how.steps,
        generator=generator,
        start=start,
        reachable_only=True,
        settle=settle,
    )


def _searched(attempt: _Attempt, armed: Mapping[SurrogateName, Surrogate], run: Evaluation) -> Predictor:
    """What a search by queries asks: the graph, or the fast form of the same torch network."""
    graph = attempt.graphs[0]
    if graph != "torch" or "float" not in armed:
        return run.judges.targets[graph]
    return armed["float"].exact() if attempt.how.onward else armed["float"]


def _settle(attempt: _Attempt, batch: Batch, indices: Int64Array, run: Evaluation) -> Settle:
    """Judge attacked images, and say of which no graph that the attack is made for is right any more."""

    def settle(attacked: Tensor, positions: Tensor) -> Tensor:
        rows = positions.cpu()
        chosen = indices[rows.numpy()]
        flags = run.judges.score(attacked, batch.images[rows], batch.labels[rows], indices=chosen, every=False)
        run.ledger.update(flags, chosen, attacked)
        return ~run.ledger.undecided(chosen, attempt.graphs)

    return settle
