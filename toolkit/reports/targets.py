"""The part of reports on other runtimes: files for them, and what of the deployed graph runs in integers where."""

from __future__ import annotations

from collections.abc import Iterable

from toolkit.reports.schema import Quantization, TargetFile
from toolkit.reports.words import percent, table

HEADER = ("file", "for", "clean", "under PGD", "same label as the float twin", "bytes", "run on")


def target_cells(files: Iterable[TargetFile]) -> list[tuple[str, ...]]:
    """The cells of a table under `HEADER`."""
    return [
        (
            file.file,
            file.target,
            percent(file.accuracy),
            "not measured" if file.robust_accuracy is None else percent(file.robust_accuracy),
            percent(file.agreement),
            f"{file.bytes:,}",
            ", ".join([*file.tested_on, *(f"UNTESTED on {name}" for name in file.untested)]),
        )
        for file in files
    ]


def untested_words(file: TargetFile) -> str:
    """One sentence of what was not seen; empty if everything was."""
    if not file.untested:
        return ""
    where = "; ".join(f"{name} ({why})" for name, why in file.untested.items())
    return f"{file.file} is UNTESTED on {where}: ONNX Runtime checked it on the CPU, which says nothing of its speed."


def targets_section(files: list[TargetFile]) -> str:
    """The files for other runtimes, as Markdown; empty where there are none."""
    if not files:
        return ""
    attacked = next((file for file in files if file.robust_accuracy is not None), None)
    made = ""
    if attacked is not None:
        made = f" PGD is made on {' and '.join(attacked.attacked_on)}; the worst counts, per image."
    notes = [f"- `{file.file}`: {file.precision}.{_fits(file)} {untested_words(file)}".rstrip() for file in files]
    cells = [(f"`{first}`", *rest) for first, *rest in target_cells(files)]
    return f"## Files for other runtimes\n\n{table(HEADER, cells)}\n\nAccuracy on the CPU.{made}\n\n" + "\n".join(notes)


def _fits(file: TargetFile) -> str:
    if file.largest_activation is None:
        return ""
    return f" Largest activation on calibration images: {file.largest_activation:.4g} (float16 ends at 65,504)."


def coverage_text(found: Quantization) -> str:
    """The integer coverage of model.onnx by provider, in one line; empty where it was not asked."""
    parts = [
        f"{row.provider} {row.integer_coverage:.1%}"
        if row.integer_coverage is not None
        else f"{row.provider} untested ({row.untested})"
        for row in found.coverage
    ]
    return f"Integer coverage by provider: {'; '.join(parts)}." if parts else ""
