"""What `toolkit reproduce` prints."""

from __future__ import annotations

import json
from pathlib import Path

from toolkit.reproduce.output import write
from toolkit.reproduce.render import render
from toolkit.reproduce.runner import Runner

__all__ = ["Runner", "fill", "plan"]

TABLES = "tables"
"""In the work folder, where no output is named."""


def plan(runner: Runner, as_json: bool) -> str:
    """What would be run, in that order, with estimates."""
    steps = runner.plan()
    if as_json:
        return json.dumps([{"step": step.text, "seconds": step.seconds} for step in steps])
    lines = [f"{step.text}   about {step.seconds:,.0f} s" for step in steps]
    total = sum(step.seconds for step in steps)
    empty = [f"not to be run: {reason}" for reason in runner.impossible()]
    return "\n".join([*lines, *empty, f"in all about {total / 3600:.1f} hours; kept in {runner.store.root}"])


def fill(runner: Runner, output: Path | None, as_json: bool) -> str:
    """Run what can be run within the limits, write all documents, and show them.

    Raises:
        ToolkitError: the folder cannot be written, which shows before anything is run.
    """
    folder = output or runner.store.root / TABLES
    ended = runner.run(show=lambda: write(runner, folder))
    documents = write(runner, folder)
    if as_json:
        return json.dumps(documents)
    text = "\n".join(render(document) for document in documents)
    failed = "".join(f"failed:  {step.label}: {reason}\n" for step, reason in runner.failed.items())
    return f"{text}\n{failed}stopped: {ended}\nwritten: {folder}"
