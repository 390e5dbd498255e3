"""What does which kind of step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from toolkit.reproduce.embedding import do_embedding
from toolkit.reproduce.measure import do_measuring
from toolkit.reproduce.steps import Kind, Step
from toolkit.reproduce.work import Bench, do_integer, do_pruning, do_training

Worker = Callable[[Step, Bench], dict[str, Any]]
WORKERS: Mapping[Kind, Worker] = {
    "train": do_training,
    "prune": do_pruning,
    "integer": do_integer,
    "measure": do_measuring,
    "embed": do_embedding,
}
LACKING: Mapping[Kind, str] = {"qat": "reproduce does not train quantisation-aware yet (`harden --qat` does)"}
"""Why a step of a kind without a worker cannot be done."""


def lacking(step: Step) -> str | None:
    """Why the step cannot be done, whatever the machine; None if it can."""
    return next((LACKING[needed.kind] for needed in step.walk() if needed.kind not in WORKERS), None)
