"""What does which kind of step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from toolkit.artifacts import Split
from toolkit.reproduce.embedding import do_embedding, lacking_class
from toolkit.reproduce.measure import do_measuring
from toolkit.reproduce.steps import Kind, Step
from toolkit.reproduce.work import Bench, do_integer, do_loading, do_pruning, do_training
from toolkit.training.qat import MIN_BITS

Worker = Callable[[Step, Bench], dict[str, Any]]
WORKERS: Mapping[Kind, Worker] = {
    "load": do_loading,
    "train": do_training,
    "qat": do_training,
    "prune": do_pruning,
    "integer": do_integer,
    "measure": do_measuring,
    "embed": do_embedding,
}


def lacking(step: Step, evaluation: Split) -> str | None:
    """Why the step cannot be done with these evaluation images, whatever the machine; None if it can."""
    shown = [needed for needed in step.walk() if needed.kind == "embed"]
    for embedding in shown:
        lacks = lacking_class(embedding, evaluation)
        if lacks is not None:
            return lacks
    bits = [needed.settings["bits"] for needed in step.walk() if needed.kind == "qat"]
    if any(number < MIN_BITS for number in bits):
        return f"quantisation-aware training rounds to at least {MIN_BITS} bits"
    return None
