"""Full evidence for the front: bundles, written by `harden`, and timed side by side with nothing else running."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from toolkit import bundle
from toolkit.artifacts import Proportion
from toolkit.config import GateConfig, HardenConfig, SearchRunConfig, build
from toolkit.errors import ToolkitError
from toolkit.evaluators.latency import ISOLATION, LatencyRow, benchmark
from toolkit.evaluators.timing import Interval
from toolkit.graphs import some_pixels, timed
from toolkit.locks import locked, stopwatch_lock
from toolkit.pipeline import harden, resolve
from toolkit.progress import notice
from toolkit.reports.schema import Report, Share
from toolkit.search.front import Limits, Point, finalists, recommend
from toolkit.search.objective import Laboratory
from toolkit.search.report import Candidate, SearchResult, own_name
from toolkit.search.runner import measurements, points_of
from toolkit.search.space import Space, digest
from toolkit.search.storage import Tried

BUNDLES = "bundles"
ORIGINS = ".origins"
"""Folder, within that of the search, that says by which search each bundle was made."""
ORIGINAL = "original"


def full_evidence(
    config: SearchRunConfig,
    output: Path,
    laboratory: Laboratory,
    space: Space,
    tried: Sequence[Tried],
    identity: Mapping[str, Any],
) -> SearchResult:
    """Write the bundles of the most promising trials, and choose among them.

    Where none of them keeps the limits, others follow that may keep them within the intervals of their cheap evidence,
    as many again at most.

    Args:
        config: of the search.
        output: its folder.
        laboratory: of its first seed.
        space: what may be tried.
        tried: the trials.
        identity: names the search; bundles of another one in the same folder are not taken for its own.

    Raises:
        ToolkitError: no trial has a result.
    """
    cheap = comparable(points_of(tried))
    if not cheap:
        reasons = "; ".join(dict.fromkeys(one.reason for one in tried if one.reason)) or "the time was spent before"
        raise ToolkitError(
            "no trial could be made",
            found=f"{len(tried)} trial(s): {reasons}",
            fix="widen the space with --space, allow more --trials or more --budget",
        )
    limits, wanted = Limits.of(config), config.search.bundles
    by_number = {one.number: one for one in tried}

    def evidence(point: Point) -> Candidate:
        folder = _folder(config, output, point.trial)
        return _bundle(config, folder, laboratory, space, by_number[point.trial], point, _hash(identity))

    done = most_promising(finalists(cheap, limits), limits, wanted, evidence)
    rows = _time(config, laboratory, done)
    candidates = tuple(replace(one, point=_timed_point(one.point, rows)) for one in done)
    return SearchResult(
        output,
        config.search.study,
        candidates,
        tuple(tried),
        tuple(cheap),
        limits,
        recommend([one.point for one in candidates], limits),
        batch=config.benchmark.batches[0],
        timing=ISOLATION,
        foreign_load=rows[0].foreign_load,
    )


def most_promising(
    ordered: Sequence[Point], limits: Limits, wanted: int, evidence: Callable[[Point], Candidate]
) -> list[Candidate]:
    """The first `wanted` points with full evidence; where none keeps the limits, as many again that may keep them."""
    done: list[Candidate] = []
    for point in ordered:
        enough = len(done) >= wanted
        if enough and (len(done) >= 2 * wanted or any(limits.kept(one.point) for one in done)):
            break
        if not enough or limits.may_keep(point):
            done.append(evidence(point))
    return done


def comparable(points: Sequence[Point]) -> list[Point]:
    """Points of several machines, their times as if all had been measured on one.

    Every trial was timed side by side with the original network; the median of the original's times stands for all.
    """
    reference = median(point.milliseconds / point.ratio.value for point in points) if points else 0.0
    return [replace(point, milliseconds=point.ratio.value * reference) for point in points]


def _folder(config: SearchRunConfig, output: Path, trial: int) -> Path:
    return output / BUNDLES / own_name(config.search.study, f"trial-{trial:03d}")


def _hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _bundle(
    config: SearchRunConfig, folder: Path, laboratory: Laboratory, space: Space, one: Tried, cheap: Point, search: str
) -> Candidate:
    """The bundle of a trial, under the first seed; one of this search that is there already is kept.

    Limits are no part of it: they are judged on the front, and may change without a bundle being made again.
    """
    found = space.config(one.parameters, config.seeds[0])
    chosen = type(found.quantize).model_validate(measurements(one)[0].quantize)
    how = found.model_copy(update={"quantize": chosen, "gates": GateConfig()})
    origin = folder.parents[1] / ORIGINS / folder.name
    ours = origin.is_file() and origin.read_text(encoding="ascii") == search
    if not (ours and _is_written(folder, resolve(how, laboratory.prepared))):
        notice(f"full evidence for trial {one.number}")
        origin.unlink(missing_ok=True)
        _write(how, laboratory, folder)
        origin.parent.mkdir(exist_ok=True)
        origin.write_text(search, encoding="ascii")
    report = bundle.read_report(folder)
    return Candidate(_point(one.number, report, folder), cheap, folder, one.parameters, _alarms(report))


def _is_written(folder: Path, config: HardenConfig) -> bool:
    """Whether the bundle of this configuration is there, with the evidence asked for."""
    if not (folder / bundle.REPORT).is_file():
        return False
    there = bundle.read_config(folder)
    same = digest(there) == digest(build(HardenConfig, config.model_dump(mode="json")))
    parts = [(one.attack, one.data.evaluation, one.threat, one.seed) for one in (there, config)]
    return same and parts[0] == parts[1]


def _write(config: HardenConfig, laboratory: Laboratory, folder: Path) -> None:
    """Harden; the fine-tuning of the trial is taken over, if it is kept here, and not made again."""
    workspace = bundle.workspace_of(folder)
    kept = laboratory.tuned_file(resolve(config, laboratory.prepared))
    if kept.is_file() and not workspace.training_checkpoint.is_file():
        workspace.root.mkdir(parents=True, exist_ok=True)
        partial = workspace.training_checkpoint.with_suffix(".tmp")
        shutil.copyfile(kept, partial)
        partial.replace(workspace.training_checkpoint)  # whole or not at all: half of one could not be resumed
    harden(config, folder, force=True, resume=workspace.resumable)


def _alarms(report: Report) -> tuple[str, ...]:
    return tuple(alarm.name for alarm in report.soundness)


def _point(trial: int, report: Report, folder: Path) -> Point:
    """What a bundle claims; its latency is replaced by that of all bundles side by side."""
    row = next(row for row in report.latency if row.file == "deployed")
    return Point(
        trial,
        _proportion(report.accuracy.deployed),
        _proportion(report.robust_accuracy.deployed),
        row.p50,
        Interval(row.ratio, row.ratio_low, row.ratio_high),
        (folder / bundle.DEPLOYED).stat().st_size,
        trusted=False,
    )


def _proportion(share: Share) -> Proportion:
    return Proportion(share.correct, share.total)


def _time(config: SearchRunConfig, laboratory: Laboratory, candidates: Sequence[Candidate]) -> tuple[LatencyRow, ...]:
    """All bundles and the original network's float graph in the same rounds, at the first batch size."""
    how = timed(resolve(config, laboratory.prepared))
    how = how.model_copy(update={"batches": how.batches[:1]})
    files = {str(one.point.trial): one.folder / bundle.DEPLOYED for one in candidates}
    shape = laboratory.prepared.model.spec.input_shape
    pixels = some_pixels(config, laboratory.prepared.splits.evaluation)
    with locked(stopwatch_lock()):
        return benchmark(
            {**files, ORIGINAL: laboratory.original.path},
            how,
            shape,
            baseline=ORIGINAL,
            seed=config.seed,
            images=pixels,
        )


def _timed_point(point: Point, rows: Sequence[LatencyRow]) -> Point:
    row = next(row for row in rows if row.file == str(point.trial))
    ratio = Interval(row.ratio, row.ratio_low, row.ratio_high)
    return replace(point, milliseconds=row.p50, ratio=ratio, trusted=row.trusted)
