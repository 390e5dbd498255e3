"""An integer graph as other machines and runtimes want it: what is written to be compared with what ships."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Variant:
    """In what a graph differs from the one that ships; same layers, same calibration."""

    reduce_range: bool = False
    """Weights in [-64, 64]."""
    signed: bool = False
    """int8 activations with zero point 0, as TensorRT wants them and as ARM is fastest with."""
    float_bias: bool = False
    """Biases are not quantised."""


DEPLOYED = Variant()


class VariantWriter(Protocol):
    """Writes variants of an integer graph."""

    def write_variant(self, output: Path, variant: Variant, *, keep_float: Collection[str] = ()) -> None:
        """Write one, with further layers left float."""
