"""Checkpoints of a training under way: written whole, and only continued by the run that wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from toolkit.errors import ToolkitError
from toolkit.progress import warn


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write `state` beside `path` first, then rename: a cut leaves the older checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    torch.save(state, partial)
    partial.replace(path)


def load_state(path: Path, fingerprint: str) -> dict[str, Any]:
    """The state at `path`.

    Raises:
        ToolkitError: damaged, or of a run with other settings.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        same = state["fingerprint"] == fingerprint
    except Exception as error:  # torch.load raises many kinds on damaged files
        raise ToolkitError(
            "the training checkpoint is damaged",
            found=f"{path}: {type(error).__name__}",
            fix="delete that file, or start again without --resume",
        ) from error
    if not same:
        raise ToolkitError(
            "the interrupted training had other settings, data or weights",
            found=str(path),
            fix="give the same arguments as before, or start again without --resume",
        )
    threads = torch.get_num_threads()
    if state["threads"] != threads:
        warn(
            f"the training began with {state['threads']} thread(s) and goes on with {threads}: "
            f"the result will differ from an uninterrupted run; --threads {state['threads']} avoids that"
        )
    return state
