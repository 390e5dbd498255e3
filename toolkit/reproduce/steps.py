"""Pieces of work as a graph: each is named by a digest of everything that determines what comes of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

Kind = Literal["load", "train", "prune", "integer", "qat", "measure", "embed"]

TRAININGS: tuple[Kind, ...] = ("train", "qat")
"""What learns weights."""

MODEL, FLOAT_GRAPH, INTEGER_GRAPH, POINTS = "model.pt", "model.fp32.onnx", "model.onnx", "points.npz"
FILES: Mapping[Kind, tuple[str, ...]] = {
    "load": (MODEL,),
    "train": (MODEL,),
    "qat": (MODEL,),
    "prune": (MODEL,),
    "integer": (INTEGER_GRAPH,),
    "measure": (),
    "embed": (POINTS,),
}
"""What others read of a step besides its result."""


@dataclass(frozen=True, eq=False)
class Step:
    """One piece of work."""

    kind: Kind
    label: str
    """For people; determines nothing."""
    settings: Mapping[str, Any]
    """Plain JSON data."""
    parents: tuple[Step, ...] = ()
    """Whose results it needs."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 over kind, settings and parents."""
        facts = [self.kind, self.settings, [parent.digest for parent in self.parents]]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def walk(self) -> Iterator[Step]:
        """What it needs, parents first, and itself; each once."""
        seen: dict[Step, None] = {}
        for parent in self.parents:
            seen.update(dict.fromkeys(parent.walk()))
        yield from seen
        yield self
