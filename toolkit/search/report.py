"""What a search found, as data, as Markdown and on the terminal."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toolkit import __version__
from toolkit.config import SearchConfig
from toolkit.reports.summary import text_table
from toolkit.search.front import Limits, Point, Recommendation, pareto
from toolkit.search.space import Parameters
from toolkit.search.storage import Tried

HEADER = ("trial", "clean", "attacked", "ms", "of the original's", "bytes", "")
DATA, MARKDOWN, PICTURE = "front.json", "front.md", "front.png"


LONGEST = 60
"""Letters of a study's name in those of its files, which may have 255 bytes."""


def own_name(study: str, name: str) -> str:
    """What a study's file or folder is called: several studies may share an output, and be called anything."""
    prefix = re.sub(r"[^\w.-]", "_", study)[:LONGEST]
    if prefix != study:
        prefix += f"-{hashlib.sha256(study.encode()).hexdigest()[:6]}"  # a/b is not a_b
    return name if study == SearchConfig().study else f"{prefix}-{name}"


CHEAP = "validation images and quick attacks"


@dataclass(frozen=True)
class Candidate:
    """A trial with full evidence, and its bundle."""

    point: Point
    cheap: Point
    folder: Path
    parameters: Parameters
    alarms: tuple[str, ...]
    """Of its report."""


@dataclass(frozen=True)
class SearchResult:
    """What a search came to."""

    output: Path
    study: str
    candidates: tuple[Candidate, ...]
    tried: tuple[Tried, ...]
    cheap: tuple[Point, ...]
    """All trials that have a result, with cheap evidence."""
    limits: Limits
    recommendation: Recommendation
    batch: int
    """Size at which latency was measured."""
    timing: str
    """How it was measured."""
    foreign_load: float
    """Share of the CPU time that other processes took while the bundles were timed."""
    failed: Mapping[int, str] = field(default_factory=dict)
    """By trial, why it has no bundle although it was promising."""

    def file(self, name: str) -> Path:
        """Where one of its files lies."""
        return self.output / own_name(self.study, name)

    @property
    def limits_kept(self) -> bool:
        return self.recommendation.keeps

    @property
    def front(self) -> tuple[int, ...]:
        """The trials whose bundles no other bundle dominates."""
        return tuple(point.trial for point in pareto([one.point for one in self.candidates]))


def record(found: SearchResult) -> dict[str, Any]:
    """As plain JSON data; names no folder but those of the bundles, relative to the output."""
    chosen = found.recommendation
    return {
        "toolkit_version": __version__,
        "limits": asdict(found.limits),
        "recommended": {"trial": chosen.point.trial, "keeps_limits": chosen.keeps, "why": chosen.why},
        "front": list(found.front),
        "latency": {"batch": found.batch, "isolation": found.timing, "foreign_load": found.foreign_load},
        "bundles": [
            {
                **_point(one.point),
                "bundle": one.folder.relative_to(found.output).as_posix(),
                "settings": dict(one.parameters),
                "cheap_evidence": _point(one.cheap),
                "alarms": list(one.alarms),
                "excess": found.limits.excess(one.point),
            }
            for one in found.candidates
        ],
        "without_bundle": [{"trial": number, "reason": reason} for number, reason in found.failed.items()],
        "trials": [
            {"trial": one.number, "settings": dict(one.parameters), "reason": one.reason, "result": one.result}
            for one in found.tried
        ],
    }


def _point(point: Point) -> dict[str, Any]:
    return {**asdict(point), "clean": point.clean.as_dict(), "robust": point.robust.as_dict()}


def table(found: SearchResult) -> list[tuple[str, ...]]:
    """One row a bundle, the recommended one first."""
    best, front = found.recommendation, found.front
    rows = []
    for one in sorted(found.candidates, key=lambda one: one.point.trial != best.point.trial):
        point = one.point
        notes = []
        if point.trial == best.point.trial:
            notes.append("recommended" if best.keeps else "nearest")
        if point.trial not in front:
            notes.append("dominated")
        if not found.limits.kept(point):
            notes.append(f"misses {', '.join(flag for flag, by in found.limits.excess(point).items() if by > 0)}")
        notes += [f"ALARM {name}" for name in one.alarms]
        rows.append((*_cells(point), "; ".join(notes)))
    return rows


def _cells(point: Point) -> tuple[str, ...]:
    ratio = point.ratio
    return (
        str(point.trial),
        str(point.clean),
        str(point.robust),
        f"{point.milliseconds:.4g}",
        f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
        f"{point.bytes:,}",
    )


def settings_text(parameters: Parameters) -> str:
    """The values of one trial in words."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in parameters.items()
    )


def render(found: SearchResult) -> str:
    """The result on the terminal."""
    best = found.recommendation
    chosen = next(one for one in found.candidates if one.point.trial == best.point.trial)
    place = shlex.quote(str(chosen.folder))
    unusable = [one for one in found.tried if one.reason is not None]
    title = "recommended" if best.keeps else "NO POINT KEEPS ALL LIMITS; nearest"
    lines = [
        f"{len(found.cheap)} trial(s) measured, {len(unusable)} impossible; full evidence for {len(found.candidates)}, "
        f"timed side by side at batch {found.batch}\n",
        text_table(HEADER, table(found)),
        "",
        *_warnings(found),
        f"{title}: trial {best.point.trial}: {settings_text(chosen.parameters)}",
        f"why:     {best.why}",
        f"\nbundle:  {chosen.folder}\nfront:   {found.file(MARKDOWN)}, {found.file(PICTURE)}",
        f"next:    toolkit report {place}",
    ]
    return "\n".join(lines)


def _warnings(found: SearchResult) -> list[str]:
    lines = [f"NO BUNDLE of trial {number}: {reason}" for number, reason in found.failed.items()]
    if not all(one.point.trusted for one in found.candidates):
        load = f"other processes took {found.foreign_load:.0%} of the CPU time meanwhile"
        lines.append(f"LATENCY NOT TO BE TRUSTED: {load}")
    best = found.recommendation.point.trial
    alarms = [name for one in found.candidates if one.point.trial == best for name in one.alarms]
    if alarms:
        lines.append(f"ALARM of trial {best}: {', '.join(alarms)}; its report.md says what its figures are worth")
    return lines


def render_markdown(found: SearchResult) -> str:
    """The front as a document."""
    best = found.recommendation
    limits = [f"{name} {value}" for name, value in asdict(found.limits).items() if value is not None]
    title = "Recommended" if best.keeps else "Nearest"
    settings = [
        (str(one.point.trial), settings_text(one.parameters), one.folder.relative_to(found.output).as_posix())
        for one in found.candidates
    ]
    parts = [
        "# Search",
        f"Limits: {', '.join(limits) or 'none'}. {title}: trial {best.point.trial}; {best.why}.",
        f"![front]({found.file(PICTURE).name})",
        "## Bundles",
        "Figures of the deployed graphs on evaluation images, with 95 % intervals; latency at batch "
        f"{found.batch}, all bundles and the original network's float graph in the same rounds ({found.timing}).",
        *_warnings(found),
        _markdown(HEADER, table(found)),
        _markdown(("trial", "settings", "bundle"), settings),
        "## All trials",
        f"Cheap evidence: {CHEAP}. Where several workers share a machine, latency was measured one at a time, beside "
        "other workers' trainings: it led the search, and is not what the bundles are judged by.",
        _markdown((*HEADER[:-1], "settings"), _trial_rows(found)),
    ]
    return "\n\n".join(parts) + "\n"


def _trial_rows(found: SearchResult) -> list[tuple[str, ...]]:
    points: Mapping[int, Point] = {point.trial: point for point in found.cheap}
    rows: list[tuple[str, ...]] = []
    for one in found.tried:
        words = settings_text(one.parameters)
        point = points.get(one.number)
        if point is None:
            rows.append((str(one.number), "", "", "", "", "", f"{words}: {one.reason}"))
        else:
            rows.append((*_cells(point), words + ("" if point.trusted else "; timed on a busy machine")))
    return rows


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
