"""Full evidence for the front: bundles, written by `harden`, and timed side by side with nothing else running."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit import __version__, bundle
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
from toolkit.search.objective import Laboratory, at_first_batch
from toolkit.search.problems import problem_of
from toolkit.search.report import Candidate, SearchResult, own_name
from toolkit.search.runner import TRACES, measurements, on_machine, points_of, tell_problem
from toolkit.search.space import Space, digest
from toolkit.search.storage import Tried

BUNDLES = "bundles"
ORIGINS = ".origins"
"""Folder, within that of the search, that says by which search and on which images each bundle was made."""
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
    as many again at most. A trial of which no bundle can be made gives its place to the next.

    Args:
        config: of the search.
        output: its folder.
        laboratory: of its first seed.
        space: what may be tried.
        tried: the trials.
        identity: names the search; bundles of another one in the same folder are not taken for its own.

    Raises:
        ToolkitError: no trial has a result, or of none a bundle can be made.
    """
    points = points_of(tried)
    if not points:
        reasons = "; ".join(dict.fromkeys(one.reason for one in tried if one.reason)) or "the time was spent before"
        raise ToolkitError(
            "no trial could be made",
            found=f"{len(tried)} trial(s): {reasons}",
            fix="widen the space with --space, allow more --trials or more --budget",
        )
    cheap = tuple(on_machine(point, laboratory.alone_ms) for point in points)
    limits, makers = Limits.of(config), _Finals(config, output, laboratory, space, tried, _hash(identity))
    ordered = finalists(cheap, limits)
    candidates = most_promising(ordered, limits, config.search.bundles, makers.evidence, makers.side_by_side)
    if not candidates:
        raise ToolkitError(
            "no bundle could be made",
            found="; ".join(f"trial {number}: {reason}" for number, reason in makers.failed.items()),
            fix="see to what they say, or widen the space with --space; the trials are kept",
        )
    return SearchResult(
        output,
        config.search.study,
        tuple(candidates),
        tuple(tried),
        cheap,
        limits,
        recommend([one.point for one in candidates], limits),
        batch=config.benchmark.batches[0],
        timing=ISOLATION,
        foreign_load=makers.foreign_load,
        failed=dict(makers.failed),
    )


def most_promising(
    ordered: Sequence[Point],
    limits: Limits,
    wanted: int,
    evidence: Callable[[Point], Candidate | None],
    side_by_side: Callable[[Sequence[Candidate]], list[Candidate]],
) -> list[Candidate]:
    """The first `wanted` points with full evidence; where none keeps the limits, as many again that may keep them.

    Args:
        ordered: the points, the most promising first.
        limits: the user's.
        wanted: number of bundles.
        evidence: full evidence for a point; None: it cannot be made, and is passed over.
        side_by_side: the same candidates, timed anew in the same rounds; limits are kept, or not, by these times.
    """
    waiting, done = list(ordered), list[Candidate]()
    while True:
        before = len(done)
        while waiting:
            enough = len(done) >= wanted
            if enough and (len(done) >= 2 * wanted or any(limits.kept(one.point) for one in done)):
                break
            point = waiting.pop(0)
            made = evidence(point) if not enough or limits.may_keep(point) else None
            done += [made] if made is not None else []
        if len(done) == before:
            return done
        done = side_by_side(done)


@dataclass
class _Finals:
    """Makes the bundles of a search, and times them."""

    config: SearchRunConfig
    output: Path
    laboratory: Laboratory
    space: Space
    tried: Sequence[Tried]
    search: str
    """Names it."""
    failed: dict[int, str] = field(default_factory=dict)
    """By trial, why it has no bundle."""
    foreign_load: float = 0.0
    """Share of the CPU time that other processes took while the bundles were timed."""

    def evidence(self, cheap: Point) -> Candidate | None:
        """The bundle of a trial; None: it cannot be made, and `failed` says why.

        Raises:
            ToolkitError: what would end all others as well.
        """
        folder = _folder(self.config, self.output, cheap.trial)
        one = next(one for one in self.tried if one.number == cheap.trial)
        try:
            return _bundle(self.config, folder, self.laboratory, self.space, one, cheap, self.search)
        except Exception as error:  # whatever one bundle meets: the others have their evidence
            problem = problem_of(error, self.output)
            if problem.fatal:
                raise problem.error() from error
            self.failed[cheap.trial] = problem.reason
            traces = self.output / own_name(self.config.search.study, TRACES)
            tell_problem(f"no bundle of trial {cheap.trial}", problem, traces)
            return None

    def side_by_side(self, made: Sequence[Candidate]) -> list[Candidate]:
        """The same bundles with their times."""
        rows = _time(self.config, self.laboratory, made)
        self.foreign_load = rows[0].foreign_load
        return [replace(one, point=_timed_point(one.point, rows)) for one in made]


def _folder(config: SearchRunConfig, output: Path, trial: int) -> Path:
    return output / BUNDLES / own_name(config.search.study, f"trial-{trial:03d}")


def _hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _says(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8", errors="replace") == text


def _bundle(
    config: SearchRunConfig, folder: Path, laboratory: Laboratory, space: Space, one: Tried, cheap: Point, search: str
) -> Candidate:
    """The bundle of a trial, under the first seed; one of this search that is there already is kept.

    Limits are no part of it: they are judged on the front, and may change without a bundle being made again.
    """
    found = space.config(one.parameters, config.seeds[0])
    chosen = type(found.quantize).model_validate(measurements(one)[0].quantize)
    how = found.model_copy(update={"quantize": chosen, "gates": GateConfig()})
    resolved = resolve(how, laboratory.prepared)
    origin = folder.parents[1] / ORIGINS / folder.name
    made_of = f"{search} {laboratory.whole.evaluation.labelled_digest}"
    if not (_says(origin, made_of) and _is_written(folder, resolved)):
        notice(f"full evidence for trial {one.number}")
        origin.unlink(missing_ok=True)
        origin.parent.mkdir(exist_ok=True)
        begun = origin.with_name(f"{folder.name}.begun")
        this = f"{made_of} {_hash(resolved.model_dump(mode='json'))} {__version__}"
        if not _says(begun, this):  # what another search left half done, or this one of other settings
            shutil.rmtree(bundle.workspace_of(folder).root, ignore_errors=True)
            begun.write_text(this, encoding="ascii")
        _write(how, laboratory, folder)
        origin.write_text(made_of, encoding="ascii")
        begun.unlink()
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
    how = at_first_batch(timed(resolve(config, laboratory.prepared)))
    files = {str(one.point.trial): one.folder / bundle.DEPLOYED for one in candidates}
    shape = laboratory.prepared.model.spec.input_shape
    pixels = some_pixels(config, laboratory.prepared.splits.evaluation)
    with laboratory.original() as original, locked(stopwatch_lock()):
        return benchmark(
            {**files, ORIGINAL: original.path},
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
