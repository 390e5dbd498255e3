"""The summary on the terminal: the few figures that count, where everything is, and what to type next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote

from toolkit.reports.markdown import percent, threat_text
from toolkit.reports.schema import Report


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
        ("accuracy, attacked", percent(baseline.robust_accuracy), percent(report.robust_accuracy.deployed)),
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
                    f"{row.p50:.3f}, {row.speedup:.2f} times as fast as its float twin",
                )
            )
    parts = [
        text_table(("", "before", "deployed"), rows),
        f"attack:  {report.robustness[0].attack}, {threat_text(report.threat)}",
        f"integer: {report.quantization.verdict}",
        *(f"ALARM    {alarm.message}" for alarm in report.soundness),
        *(
            f"GATE     {gate.name} {gate.limit:g}: measured {gate.value:.4f}, {'met' if gate.met else 'NOT MET'}"
            for gate in report.gates
        ),
        f"\nbundle:  {folder}\nreport:  {folder / 'report.md'}",
        f"next:    toolkit verify {place}\n         toolkit attack {place} --restarts 5\n"
        f"         toolkit harden --config {quote(str(folder / 'config.yaml'))} --output {quote(f'{folder}-again')}",
    ]
    return "\n".join(parts)


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
            f"{single.p50:.3f}" if single else "-",
        )
        rows.append(row)
    return header, rows
