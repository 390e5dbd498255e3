"""Writing what is known: Markdown, JSON and a plot for every table and figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.bundle import disk_errors
from toolkit.reproduce.document import documents
from toolkit.reproduce.plots import draw
from toolkit.reproduce.render import render
from toolkit.reproduce.runner import Runner


def write(runner: Runner, folder: Path) -> Sequence[dict[str, Any]]:
    """Write every document to `folder`, over older versions of it; gives them back.

    Raises:
        ToolkitError: the folder cannot be written.
    """
    with disk_errors(folder), runner.store.publishing():
        found = documents(runner)
        folder.mkdir(parents=True, exist_ok=True)
        for document in found:
            name = document["target"]
            plot = folder / f"{name}.png"
            drawn = draw(document, plot)
            (folder / f"{name}.md").write_text(render(document, plot.name if drawn else None), encoding="utf-8")
            text = json.dumps(_public(document), indent=1, ensure_ascii=False)
            (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return found


def _public(document: dict[str, Any]) -> dict[str, Any]:
    """Without the paths of this machine."""
    panels = []
    for panel in document["panels"]:
        shown = dict(panel)
        if "embedding" in shown:
            shown["embedding"] = {name: value for name, value in shown["embedding"].items() if name != "file"}
        panels.append(shown)
    return {**document, "panels": panels}
