"""What the activations of a float graph are like on calibration images: extremes and histograms, streamed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import ModelProto, TensorProto, helper
from torch import Tensor

from toolkit.artifacts import Int64Array
from toolkit.errors import ToolkitError
from toolkit.exporters.calibration import CalibrationReader
from toolkit.exporters.session import make_session

BINS = 8192
"""So fine that 256 levels over a fortieth of the range still have a bin or more each."""


@dataclass(frozen=True, slots=True)
class Observed:
    """One tensor over all calibration images."""

    low: float
    high: float
    """The least and the largest value."""
    mean_low: float
    mean_high: float
    """Means of these over the batches."""
    counts: Int64Array | None
    """Values in each of `BINS` equal parts of [low, high], zeros left out; None: not asked for."""
    zeros: int = 0
    """Values that are exactly 0, which every grid represents."""
    constant_channels: int = 0
    """Channels with one value throughout."""

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """The middles of the parts, float64 [`BINS`]."""
        width = (self.high - self.low) / BINS
        return self.low + width * (np.arange(BINS, dtype=np.float64) + 0.5)


def observe(
    model: ModelProto, tensors: Iterable[str], reader: CalibrationReader, *, histograms: bool
) -> Mapping[str, Observed]:
    """Run calibration images through a float graph and look at some of its tensors.

    Memory holds one batch with its activations. Histograms take a second pass over the images.

    Args:
        model: the graph; left as it is.
        tensors: names of float tensors, the graph's input included where wanted.
        reader: the images.
        histograms: whether the distributions are wanted, or their ends only.

    Raises:
        ToolkitError: activations that are no finite numbers.
    """
    names = list(dict.fromkeys(tensors))
    with tempfile.TemporaryDirectory(prefix="toolkit-calibrate-") as folder:
        session = exposed_session(model, names, Path(folder) / "observed.onnx")
        ends = _Ends()
        for batch in _run(session, names, reader):
            ends.add(batch)
        found = ends.result()
        if histograms:
            return _with_counts(found, _run(session, names, reader))
    return found


def channel_peaks(
    model: ModelProto, tensors: Iterable[str], reader: CalibrationReader
) -> Mapping[str, npt.NDArray[np.float64]]:
    """The largest absolute value of every channel (of the second axis) on calibration images, float64 [C].

    Args:
        model: the graph; left as it is.
        tensors: names of float tensors that nodes make.
        reader: the images.

    Raises:
        ToolkitError: activations that are no finite numbers.
    """
    names, found = list(tensors), dict[str, Tensor]()
    with tempfile.TemporaryDirectory(prefix="toolkit-calibrate-") as folder:
        for batch in _run(exposed_session(model, names, Path(folder) / "observed.onnx"), names, reader):
            for name, values in batch.items():
                peaks = values.abs().transpose(0, 1).flatten(1).amax(1)
                if not bool(torch.isfinite(peaks).all()):
                    raise no_finite_numbers(name)
                found[name] = torch.maximum(found.get(name, peaks), peaks)
    return {name: values.numpy().astype(np.float64) for name, values in found.items()}


def no_finite_numbers(name: str) -> ToolkitError:
    """The error for a tensor that overflows."""
    return ToolkitError(
        "the network's activations are no finite numbers",
        found=f"at '{name}' on the calibration images",
        fix="the training diverged: train again with a lower --learning-rate, or take an earlier checkpoint",
    )


def activation_bytes(model: ModelProto, tensors: Iterable[str]) -> int:
    """Memory that the tensors of one image take, as far as their shapes can be inferred."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    wanted = set(tensors)
    total = 0
    for value in (*graph.value_info, *graph.input, *graph.output):
        if value.name in wanted:
            axes = value.type.tensor_type.shape.dim
            batch = next((at for at, axis in enumerate(axes) if not axis.dim_value), 0)  # attention has it second
            sizes = [axis.dim_value or 1 for at, axis in enumerate(axes) if at != batch]
            total += 4 * int(np.prod(sizes, dtype=np.int64))
    return total


def exposed_session(model: ModelProto, names: Iterable[str], path: Path, *, optimized: bool = True) -> Any:
    """A session on a copy of the graph, written to `path`, that gives float tensors of it as outputs too."""
    augmented = ModelProto()
    augmented.CopyFrom(model)
    shown = {value.name for value in augmented.graph.output}
    inputs = {value.name for value in augmented.graph.input}
    for name in names:
        if name not in shown | inputs:
            augmented.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    onnx.save(augmented, path)
    return make_session(path, optimized=optimized)


def _run(session: Any, names: list[str], reader: CalibrationReader) -> Iterator[dict[str, Tensor]]:
    """All tensors of one batch after the other."""
    reader.rewind()
    inputs = {node.name for node in session.get_inputs()}
    outputs = [name for name in names if name not in inputs]
    for feed in iter(reader.get_next, None):
        given = {name: values for name, values in feed.items() if name in names}
        made = dict(zip(outputs, session.run(outputs, feed), strict=True)) if outputs else {}
        yield {name: torch.from_numpy(np.asarray(values)) for name, values in {**given, **made}.items()}


class _Ends:
    """Running extremes, and sums of every batch's own."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[float, float, float, float, int]] = {}
        self._channels: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, batch: Mapping[str, Tensor]) -> None:
        for name, values in batch.items():
            lows, highs = _ends_of_channels(values)
            low, high = float(lows.amin()), float(highs.amax())
            if not (np.isfinite(low) and np.isfinite(high)):
                raise no_finite_numbers(name)
            least, largest, sum_low, sum_high, count = self._found.get(name, (low, high, 0.0, 0.0, 0))
            self._found[name] = (min(least, low), max(largest, high), sum_low + low, sum_high + high, count + 1)
            before = self._channels.get(name, (lows, highs))
            if len(before[0]) != len(lows):  # attention has the batch on its second axis: these are no channels
                lows = highs = torch.zeros(0)
                before = lows, highs
            self._channels[name] = torch.minimum(before[0], lows), torch.maximum(before[1], highs)

    def result(self) -> dict[str, Observed]:
        return {
            name: Observed(low, high, lows / count, highs / count, None, 0, self._constant(name))
            for name, (low, high, lows, highs, count) in self._found.items()
        }

    def _constant(self, name: str) -> int:
        lows, highs = self._channels[name]
        return int((lows == highs).sum())


def _ends_of_channels(values: Tensor) -> tuple[Tensor, Tensor]:
    """Least and largest value of every channel: of the second axis, or of the last of three (tokens)."""
    values = values if values.ndim else values.reshape(1)
    axis = values.ndim - 1 if values.ndim == 3 else min(1, values.ndim - 1)
    others = [other for other in range(values.ndim) if other != axis]
    return (values.amin(others), values.amax(others)) if others else (values, values)


def _with_counts(ends: Mapping[str, Observed], batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Observed]:
    counts = {name: np.zeros(BINS, dtype=np.int64) for name in ends}
    zeros = dict.fromkeys(ends, 0)
    for batch in batches:
        for name, values in batch.items():
            low, high = ends[name].low, ends[name].high
            present = values[values != 0]
            zeros[name] += values.numel() - present.numel()
            if high > low and present.numel():
                counts[name] += torch.histc(present, BINS, low, high).to(torch.int64).numpy()
    return {name: replace(one, counts=counts[name], zeros=zeros[name]) for name, one in ends.items()}
