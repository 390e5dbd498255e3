"""How sensitive a network is to the rounding of each layer.

Clean images say little of it: their pixels are exact in 8 bits, so that a first layer rounds nothing which matters, and
most of them lie far from any boundary. An attack works next to the boundary, where what decides is the error of the
margin, label against runner-up (`Judge.noise`). Two questions are asked of each layer. How much of that error is gone
with it alone in float: steady from few images, and what leaving it float is worth. And what the network loses with it
alone in integers: the figures that users ask for, which need thousands of images to be told from none.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit.evaluators.judge import Drop, Judge
from toolkit.exporters.engine import Writer


@dataclass(frozen=True, slots=True)
class LayerSensitivity:
    """What one layer's rounding does."""

    layer: str
    relief: float
    """Share of the error, `Judge.noise`, that is gone with this layer alone in float; may be negative."""
    logits: float
    """The same of the clean logits' error, `Judge.disturbance`."""
    drop: Drop | None = None
    """Accuracy and robust accuracy lost with this layer alone in integers; None: not measured, for want of time."""


def measure_sensitivity(
    quantizer: Writer,
    layers: Sequence[str],
    judge: Judge,
    *,
    seconds: float | None = None,
    advance: Callable[[], object] = lambda: None,
) -> tuple[LayerSensitivity, ...]:
    """Write and judge two graphs for every layer: it alone in float, and it alone in integers.

    Args:
        quantizer: writes the graphs; layers that its configuration leaves float stay so.
        layers: of the network, in the order of the graph, those that may be integer.
        judge: of accuracy.
        seconds: for accuracy lost, about, those layers first whose error is largest; None: as long as it takes.
        advance: told of every layer's first graph.

    Returns:
        The layers in the order of the graph, all with their relief.
    """
    with tempfile.TemporaryDirectory(prefix="toolkit-sensitivity-") as folder:
        path = Path(folder, "one.onnx")

        def write(keep_float: Collection[str]) -> Path:
            quantizer.write(path, keep_float=keep_float)
            return path

        def errors(keep_float: Collection[str]) -> tuple[float, float]:
            file = write(keep_float)
            return judge.noise(file), judge.disturbance(file)

        total = errors(())
        found = {}
        for layer in layers:
            left = errors({layer}) if len(layers) > 1 else (0.0, 0.0)
            relief, logits = (_gone(before, after) for before, after in zip(total, left, strict=True))
            found[layer] = LayerSensitivity(layer, relief, logits)
            advance()
        end = None if seconds is None else time.monotonic() + seconds
        for one in ranked(found.values()):
            if end is not None and time.monotonic() >= end:
                break
            found[one.layer] = replace(one, drop=judge.drop(write(set(layers) - {one.layer}), short=True))
    return tuple(found.values())


def _gone(before: float, after: float) -> float:
    return 1 - after / before if before > 0 else 0.0


def ranked(layers: Collection[LayerSensitivity]) -> list[LayerSensitivity]:
    """Those first that it pays most to leave float."""
    return sorted(layers, key=lambda one: -one.relief)
