"""What a network costs: parameters, multiply-accumulates, and the proof of how many of them run in integers."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from toolkit.artifacts import TorchModel
from toolkit.errors import ToolkitError
from toolkit.evaluators.kernels import Kernel, match, measure
from toolkit.exporters.onnx import load_onnx
from toolkit.exporters.session import Provider

LEFTOVERS = ("QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput")
"""Nodes that compute nothing and cost time: conversions of type and of memory layout."""
RUNS = 8


def parameters(model: TorchModel) -> int:
    """The number of trainable and frozen parameters; buffers do not count."""
    return sum(parameter.numel() for parameter in model.module.parameters())


def macs(model: TorchModel) -> int:
    """Multiply-accumulates of all convolutions, linear layers and matrix products for one image."""
    return sum(layer_macs(model).values())


def layer_macs(model: TorchModel) -> Mapping[str, int]:
    """Multiply-accumulates for one image by module name, each counted in the innermost module that computes it."""
    module = model.copy().module.cpu().float().eval()
    counter = FlopCounterMode(display=False)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it and fused attention hide products
    try:
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            module(torch.zeros(1, *model.spec.input_shape))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    root = type(module).__name__
    totals = {name: sum(found.values()) for name, found in counter.get_flop_counts().items() if name != "Global"}
    inner: Counter[str] = Counter()
    for name, total in totals.items():
        inner[name.rpartition(".")[0]] += total
    own = {name.removeprefix(f"{root}."): (total - inner[name]) // 2 for name, total in totals.items()}
    return {name: count for name, count in own.items() if count}


@dataclass(frozen=True, slots=True)
class LayerKernel:
    """A layer of the graph in the file, and the kernel that runs it after optimisation."""

    layer: str
    kernel: str
    """Operator type after optimisation; `(none)` where it was fused into something unknown, which counts as float."""
    domain: str
    macs: int
    integer: bool
    microseconds: float | None = None
    """For one image, with whatever was fused into the kernel; None: no kernel is known."""


@dataclass(frozen=True, slots=True)
class FloatIsland:
    """Float kernels of one operator type in the optimised graph."""

    operator: str
    count: int
    time_share: float


@dataclass(frozen=True)
class IntegerCoverage:
    """How much of an ONNX file runs in integers on a provider, measured on the graph after optimisation."""

    provider: str
    macs_integer: int
    macs_total: int
    layers: tuple[LayerKernel, ...]
    kernel_time_share_integer: float
    """Share of measured kernel time (batch 1) in kernels that read and write 8-bit data or multiply integers."""
    leftovers: Mapping[str, int]
    """Nodes left that only convert type or layout, by operator."""
    islands: tuple[FloatIsland, ...]

    @property
    def share(self) -> float:
        """Integer multiply-accumulates over all multiply-accumulates."""
        return self.macs_integer / self.macs_total


def integer_coverage(
    path: Path, *, provider: Provider = "cpu", threads: int | None = None, image: tuple[int, ...] | None = None
) -> IntegerCoverage:
    """Measure the integer coverage of any ONNX classifier, float ones (coverage 0) included.

    Multiply-accumulates are those of the graph in the file, so that padding (nchwc) does not count; which kernel runs
    each layer, and the time it takes, come from ONNX Runtime's optimised graph and a profile of it at batch 1.

    Args:
        path: the file.
        provider: what runs it.
        threads: CPU threads.
        image: sizes of one image, in the order of the graph's axes, for files that take any.

    Raises:
        ToolkitError: no ONNX in the file, or no convolution and no matrix product in it.
    """
    model = load_onnx(path)
    with tempfile.TemporaryDirectory(prefix="toolkit-profile-") as folder:
        written = measure(model, Path(folder), optimized=False, provider="cpu", threads=threads, runs=1, image=image)
        how: dict[str, Any] = {"provider": provider, "threads": threads, "runs": RUNS, "image": image}
        running = measure(model, Path(folder), optimized=True, **how)
    layers = [kernel for kernel in written if kernel.work is not None]
    if not layers:
        raise ToolkitError(
            "the graph has no layer whose work could be counted",
            found=f"{path}: no Conv, Gemm, MatMul or the like",
            fix="name an ONNX classifier",
        )
    found = match(layers, [kernel for kernel in running if kernel.work is not None])
    rows = tuple(_row(layer, found.get(layer.name)) for layer in layers)
    counts = Counter(kernel.operator for kernel in running)
    total_time = math.fsum(kernel.microseconds for kernel in running) or 1.0
    integer_time = math.fsum(kernel.microseconds for kernel in running if kernel.integer)
    return IntegerCoverage(
        provider,
        sum(row.macs for row in rows if row.integer),
        sum(row.macs for row in rows),
        rows,
        integer_time / total_time,
        {name: counts[name] for name in LEFTOVERS},
        _islands(running, total_time),
    )


def _row(layer: Kernel, kernel: Kernel | None) -> LayerKernel:
    if kernel is None:
        return LayerKernel(layer.name, "(none)", "", layer.macs, False)
    return LayerKernel(layer.name, kernel.operator, kernel.domain, layer.macs, kernel.integer, kernel.microseconds)


def _islands(running: list[Kernel], total_time: float) -> tuple[FloatIsland, ...]:
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for kernel in running:
        if kernel.float_data and kernel.operator not in LEFTOVERS:
            times[kernel.operator] += kernel.microseconds  # type: ignore[assignment]  # a Counter of floats
            counts[kernel.operator] += 1
    return tuple(
        FloatIsland(name, counts[name], time / total_time)
        for name, time in sorted(times.items(), key=lambda item: -item[1])
    )
