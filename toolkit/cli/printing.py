"""What several commands print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.artifacts import TorchModel
    from toolkit.planning import PlannedStep
    from toolkit.reports.schema import Report


def print_plan(steps: Sequence[PlannedStep], where: str, as_json: bool) -> None:
    """What a run would do, step by step with an estimate."""
    if as_json:
        print(json.dumps([{"step": step.text, "seconds": step.seconds} for step in steps]))
        return
    for step in steps:
        print(f"{step.text}   about {step.seconds:.0f} s" if step.seconds else step.text)
    print(f"in all about {sum(step.seconds for step in steps) / 60:.1f} minutes; {where}")


def print_report(found: Report, folder: Path, as_json: bool) -> None:
    """The summary of a bundle, or all of its report."""
    if as_json:
        print(found.model_dump_json())
        return
    from toolkit.reports.summary import render_summary

    print(render_summary(found, folder))


def radius_of(model: TorchModel) -> str:
    """What a next command needs where the network's images have no preset of threat models."""
    return " --eps 8/255" if ":" in (model.spec.dataset or "") else ""


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns of text."""
    from toolkit.reports.summary import text_table

    print(text_table(header, rows))
