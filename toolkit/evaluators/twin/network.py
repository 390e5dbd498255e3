"""The torch module that executes an ONNX graph, node by node.

An interpreter of our own rather than a converter's module: it keeps quantised tensors as centred integers, which is
what makes it agree with ONNX Runtime's integer kernels, and it holds nothing but buffers, so that copying it, casting
it and moving it work as for any network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from toolkit.evaluators.twin.values import HELD, Scaled, plain, round_to_grid

Observer = Callable[[str, str, tuple[Any, ...], Mapping[str, Any]], None]
CREATES = frozenset({"Cast", "ConstantOfShape", "Range"})
"""Operators that make floating tensors out of shapes: these belong where the images are."""


@dataclass(frozen=True)
class Step:
    """One node: a function of named values."""

    operator: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    """An empty name is an input that the node leaves out."""
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    release: tuple[str, ...] = ()
    """Values that no later step reads."""


@dataclass(frozen=True)
class Entry:
    """How images become the graph's input, and in what batches the graph takes them."""

    name: str
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    pixel_scale: float = 1.0
    integers: bool = False
    """The graph takes whole numbers: pixels are rounded, straight-through."""
    batch: int | None = None

    def feed(self, images: Tensor) -> Tensor:
        """Images [n, C, H, W] as the graph wants them."""
        if self.integers:
            images = round_to_grid(images, images.new_tensor(self.pixel_scale), 0.0, 255.0, divide=False)
        elif self.pixel_scale != 1:
            images = images * self.pixel_scale
        return images.permute(0, 2, 3, 1) if self.layout == "NHWC" else images


class TwinNetwork(nn.Module):
    """Executes the steps of a graph on images [n, C, H, W].

    Floating constants and masks are buffers; shapes and indices stay on the CPU, where they are read.

    Args:
        steps: in topological order.
        constants: every name that the steps read and none of them writes, the input apart.
        entry: the graph's input.
        output: the name of what the module returns.
    """

    def __init__(self, steps: Sequence[Step], constants: Mapping[str, Any], entry: Entry, output: str) -> None:
        super().__init__()
        self._steps = tuple(steps)
        self._entry = entry
        self._output = output
        self._observer: Observer | None = None
        self._integers: dict[str, Tensor] = {}
        self._buffers_of: dict[str, tuple[str, ...]] = {}
        for number, (name, value) in enumerate(constants.items()):
            parts = (value.values, value.scale) if isinstance(value, Scaled) else (plain(value),)
            if not parts[0].is_floating_point() and parts[0].dtype != torch.bool:
                self._integers[name] = parts[0]
                continue
            self._buffers_of[name] = tuple(f"constant_{number}_{part}" for part in range(len(parts)))
            for buffer, part in zip(self._buffers_of[name], parts, strict=True):
                self.register_buffer(buffer, part.contiguous().clone())

    @property
    def entry(self) -> Entry:
        """How images become the graph's input."""
        return self._entry

    def with_entry(self, entry: Entry) -> TwinNetwork:
        """A copy that takes its images in another way."""
        copied = copy.deepcopy(self)
        copied._entry = entry
        return copied

    @property
    def steps(self) -> tuple[Step, ...]:
        """The nodes, in the order in which they run."""
        return self._steps

    def with_functions(self, functions: Mapping[str, Callable[..., Any]]) -> TwinNetwork:
        """A copy in which the steps with these first outputs compute something else of the same inputs."""
        copied = copy.deepcopy(self)
        copied._steps = tuple(
            replace(step, function=functions.get(step.outputs[0], step.function)) for step in self._steps
        )
        return copied

    def observe(self, observer: Observer | None) -> None:
        """Call `observer` before every step with its operator, its first output's name, its inputs and attributes."""
        self._observer = observer

    def forward(self, images: Tensor) -> Tensor:
        """The graph's output for images [n, C, H, W], in the units that `Entry` turns into the graph's."""
        size = self._entry.batch
        if size is None or len(images) == size:
            return self._run(images)
        parts = []
        for part in torch.split(images, size):
            missing = size - len(part)
            whole = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part
            parts.append(self._run(whole)[: len(part)])
        return torch.cat(parts)

    def _run(self, images: Tensor) -> Tensor:
        values = self._constants()
        values[self._entry.name] = self._entry.feed(images)
        values[""] = None
        for step in self._steps:
            inputs = tuple(values[name] for name in step.inputs)
            if self._observer is not None:
                self._observer(step.operator, step.outputs[0], inputs, step.attributes)
            found = step.function(*inputs)
            if step.operator in CREATES and isinstance(found, Tensor) and found.is_floating_point():
                found = found.to(images)
            if isinstance(found, tuple) and not isinstance(found, HELD):
                values.update(zip(step.outputs, found, strict=False))
            else:
                values[step.outputs[0]] = found
            for name in step.release:
                values.pop(name, None)
        result: Tensor = plain(values[self._output])
        return result

    def _constants(self) -> dict[str, Any]:
        values: dict[str, Any] = dict(self._integers)
        buffers = self._buffers
        for name, parts in self._buffers_of.items():
            held: Any = [buffers[part] for part in parts]
            values[name] = held[0] if len(held) == 1 else Scaled(*held)
        return values
