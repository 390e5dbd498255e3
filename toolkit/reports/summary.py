"""The summary on the terminal: the few figures that count, where everything is, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from toolkit.evaluators.timing import BUSY
from toolkit.reports.portability import warnings
from toolkit.reports.robustness import (
    JUDGES,
    PASS_HEADER,
    curve_rows,
    matrix_rows,
    pass_rows,
    plan_text,
    robust_text,
    transfer_rows,
    twin_text,
)
from toolkit.reports.schema import AttackReport, Report
from toolkit.reports.targets import untested_words
from toolkit.reports.words import percent, threat_text


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in plain text; numbers and words are set left."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    drawn = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([drawn[0], "  ".join("-" * width for width in widths), *drawn[1:]])


def render_summary(report: Report, folder: Path) -> str:
    """The figures of one bundle, its place, and the next commands to copy."""
    model, baseline, place = report.model, report.baseline, quote(str(folder))
    rows = [
        ("accuracy, clean", percent(baseline.accuracy), percent(report.accuracy.deployed)),
        (
            "accuracy, attacked",
            f"{percent(baseline.robust_accuracy)}, PGD alone",
            robust_text(report.robust_accuracy.deployed, report),
        ),
        ("parameters", f"{model.params.before:,}", f"{model.params.after:,}"),
        ("MACs per image", f"{model.macs.before:,}", f"{model.macs.after:,}"),
        ("ONNX file", f"{model.bytes.before:,} bytes", f"{model.bytes.after:,} bytes"),
    ]
    times = {(row.file, row.batch): row for row in report.latency}
    for (file, batch), row in times.items():
        if file == "deployed":
            before = times.get(("original", batch))
            rows.append(
                (
                    f"ms at batch {batch}",
                    f"{before.p50:.3f}" if before else "-",
                    f"{row.p50:.3f}, not to be trusted: other processes used the CPU"
                    if row.foreign_load > BUSY
                    else f"{row.p50:.3f}, {row.speedup:.2f} times as fast as its float twin",
                )
            )
    parts = [
        text_table(("", "before", "deployed"), rows),
        *(f"ALARM    {alarm.name}: {alarm.message}" for alarm in report.soundness),
        *(f"WARNING  {line}" for line in warnings(report.quantization.elsewhere)),
        f"attack:  {report.worst_case.attacks}, worst case per image; {threat_text(report.threat)}",
        f"integer: {report.quantization.verdict}",
        *(f"target:  {file.file}, {file.precision}; {untested_words(file)}".rstrip("; ") for file in report.targets),
        *(
            f"GATE     {gate.name} {gate.limit:g}: measured {gate.value:.4f}, {'met' if gate.met else 'NOT MET'}"
            for gate in report.gates
        ),
        f"\nbundle:  {folder}\nreport:  {folder / 'report.md'}",
        f"next:    toolkit verify {place}\n         toolkit attack {place} --attacks ensemble\n"
        f"         toolkit harden --config {quote(str(folder / 'config.yaml'))} --output {quote(f'{folder}-again')}",
    ]
    return "\n".join(parts)


def render_attack(found: AttackReport, gallery: Path | None = None) -> str:
    """What `toolkit attack` found: the robust accuracy and its alarms first, then what it rests on."""
    parts = [
        f"{found.target} on {found.data}, {found.images} images\n{threat_text(found.threat)}\n"
        f"attacks: {found.worst_case.attacks}; robust accuracy is the worst case per image, clean images included\n",
        text_table(("graph", "clean", "robust accuracy"), _accuracies(found)),
        *(f"ALARM    {alarm.name}: {alarm.message}" for alarm in found.soundness),
        *_unfinished(found),
        *_evidence(found),
    ]
    if gallery is not None:
        parts.append(f"images that fool the graph: {gallery}")
    return "\n".join(parts)


def _accuracies(found: AttackReport) -> list[tuple[str, str, str]]:
    """One row a graph; the files are those that the graph that counts reads."""
    counts = "deployed" if "deployed" in found.accuracy else next(iter(found.accuracy))
    labels = {**JUDGES, "deployed_from_file": f"{JUDGES[counts]}, from 8-bit PNG files"}
    clean = {name: percent(share) for name, share in found.accuracy.items()}
    robust = {name: robust_text(share, found) for name, share in found.robust_accuracy.items()}
    return [(labels[name], clean.get(name, "-"), robust.get(name, "-")) for name in dict.fromkeys((*clean, *robust))]


def _unfinished(found: AttackReport) -> list[str]:
    """What was not run, beside the figure that it makes an upper bound."""
    missing = [f"NOT RUN  {what}" for what in found.worst_case.not_run]
    if missing:
        missing.append("UNFINISHED: what is left may fall further; the same command with --resume goes on")
    if found.budget is not None:
        missing.append(f"with --budget {found.budget:g} (seconds), figures depend on the speed of the machine")
    return missing


def _evidence(found: AttackReport) -> list[str]:
    parts = []
    if found.robustness:
        parts.append(f"\n{plan_text(found.robustness[0])}: accuracy left, 95 % interval in percent")
        parts.append(text_table(*matrix_rows(found)))
        parts.append("\nimages that fooled the attacked network and fool the graph too")
        parts.append(text_table(*transfer_rows(found)))
    if found.worst_case.passes:
        parts.append("\nfurther attacks, on the images that still stood")
        parts.append(text_table(PASS_HEADER, pass_rows(found)))
    if found.security_curve:
        parts.append("\nover the radius: pgd alone, on the network whose attacks transfer best")
        header = ("eps", "steps", f"accuracy (n={found.security_curve[0].total})")
        parts.append(text_table(header, curve_rows(found.security_curve)))
    if found.fidelity is not None:
        parts.append("\n" + twin_text(found).replace("; ", ";\n").replace(", under", ",\nunder"))
    if found.clipped_share is not None:
        parts.append(f"attacked pixels outside the integer graph's input range: {found.clipped_share:.2%}")
    return parts


def comparison(reports: Mapping[str, Report]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table with one bundle a row."""
    header = ("bundle", "network", "pruned", "data", "clean", "attacked", "eps", "integer", "bytes", "ms at batch 1")
    rows: list[tuple[str, ...]] = []
    for name, report in reports.items():
        single = next((row for row in report.latency if row.file == "deployed" and row.batch == 1), None)
        space = "px" if report.threat.space == "pixels" else "norm."
        row = (
            name,
            report.model.architecture,
            f"{report.model.prune_ratio:g}",
            report.data.source,
            percent(report.accuracy.deployed),
            percent(report.robust_accuracy.deployed),
            f"{report.threat.eps:.4g} {space}",
            f"{report.quantization.integer_coverage:.1%}",
            f"{report.model.bytes.after:,}",
            f"{single.p50:.3f}{' (busy)' if single.foreign_load > BUSY else ''}" if single else "-",
        )
        rows.append(row)
    return header, rows
