"""Integer layers as x86 without VNNI computes them: two neighbouring products are summed in 16 bits, with saturation.

There, ONNX Runtime's kernels for uint8 activations and int8 weights (MLAS, for AVX2 and for AVX-512 without VNNI)
multiply with `vpmaddubsw`: the products of positions 2j and 2j + 1 of the reduction axis are added and clipped to
[-32768, 32767], and the clipped sums go on in 32 bits. The integers are those of memory, zero points included; what
pads an image is its zero point. The reduction axis of a convolution is ordered by kernel position and then by channel
of the group, whether images lie channels-first or channels-last (QLinearConv brings them and the weights into
that order; its symmetric kernel takes four channels at a time, which makes the same pairs). Of a product it is the
inner axis as it stands. Not concerned: depthwise convolutions, products of two activations and unsigned weights
(kernels that widen to 16 bits first). Signed activations are taken for unsigned ones by adding 128 first, so they
saturate too. Compared with ONNX Runtime on such a machine, bit by bit (docs/results, without-vnni).

A pair of weights overflows only if both have one sign and sum to 129 or more, so that few pairs have to be looked at:
the sums are the exact ones, and what is clipped of single pairs is taken off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from toolkit.artifacts import Normalized
from toolkit.evaluators.cost import IntegerCoverage, integer_coverage
from toolkit.evaluators.saturating_layers import Spared, saturates_here, saturating_layers
from toolkit.evaluators.surrogate import Twin, build_twin
from toolkit.evaluators.twin.layers import pad_spatial, padding
from toolkit.evaluators.twin.network import Step, TwinNetwork
from toolkit.evaluators.twin.values import Scaled
from toolkit.exporters.interface import GraphInterface
from toolkit.exporters.onnx import load_onnx, with_names
from toolkit.exporters.qoperator import to_qdq
from toolkit.exporters.session import Provider

LEAST, LARGEST = -32768, 32767
"""Of a sum of two products."""
BLOCK = 2**22
"""Sums of pairs that are computed at a time, and elements of the columns of an image."""


@dataclass(slots=True)
class Overflows:
    """Sums of pairs in one layer over all images that were run, and those that 16 bits cannot hold."""

    layer: str
    operator: str
    pairs: int = 0
    overflows: int = 0

    @property
    def share(self) -> float:
        return self.overflows / self.pairs if self.pairs else 0.0


@dataclass(frozen=True)
class RiskyPairs:
    """The pairs of weights of one layer that overflow with some activations up to a largest one."""

    channel: Tensor
    """Output channel, int64 [m]."""
    position: Tensor
    """Of both factors on the reduction axis, int64 [m, 2]."""
    weights: Tensor
    """[m, 2]."""


def risky_pairs(weights: Tensor, largest: Tensor | float = 255.0) -> RiskyPairs:
    """Find the pairs that can overflow.

    Args:
        weights: integers [channels, K], the reduction axis in the order of the kernel.
        largest: activation that occurs; one, or broadcastable to the weights.
    """
    length = weights.shape[1]
    reached = functional.pad(weights * largest, (0, length % 2)).reshape(len(weights), -1, 2)
    above, below = reached.clamp(min=0).sum(2) > LARGEST, reached.clamp(max=0).sum(2) < LEAST
    channel, pair = (above | below).nonzero(as_tuple=True)
    position = torch.stack([2 * pair, (2 * pair + 1).clamp(max=length - 1)], dim=1)
    even = functional.pad(weights, (0, length % 2)).reshape(len(weights), -1, 2)
    return RiskyPairs(channel, position, even[channel, pair])


def clipped_off(columns: Tensor, pairs: RiskyPairs, channels: int) -> tuple[Tensor, int]:
    """What saturation takes off the exact sums, and how often it does.

    Args:
        columns: activations [K, places], integers as they lie in memory.
        pairs: those of the layer's weights that can overflow.
        channels: of the output.

    Returns:
        the sum over all pairs of (sum of the pair - clipped sum), float64 [channels, places]; the number of overflows.
    """
    places = columns.shape[1]
    total = torch.zeros(channels, places, dtype=torch.float64, device=columns.device)
    overflows = 0
    block = max(1, BLOCK // places)
    for start in range(0, len(pairs.channel), block):
        chosen = slice(start, start + block)
        (first, second), weights = pairs.position[chosen].T, pairs.weights[chosen].to(columns)
        sums = torch.addcmul(columns[first] * weights[:, :1], columns[second], weights[:, 1:])
        excess = sums - sums.clamp(LEAST, LARGEST)
        overflows += int(excess.count_nonzero())
        total.index_add_(0, pairs.channel[chosen], excess.double())
    return total, overflows


class SaturatingTwin:
    """The twin of a graph, computing as x86 without VNNI does; counts overflows over all images that it is given.

    Args:
        twin: of the graph.
        path: the file that the twin was read from.
        running: its integer coverage, which tells the layers that integer kernels run.
    """

    def __init__(self, twin: Twin, path: Path, running: IntegerCoverage) -> None:
        network = twin.module.network
        if not isinstance(network, TwinNetwork):
            raise TypeError("only a twin can be emulated")
        integer = {row.layer for row in running.layers if row.integer}
        layers, self._spared = saturating_layers(to_qdq(with_names(load_onnx(path))), integer)
        self._counts: dict[str, Overflows] = {}
        changed: dict[str, Callable[..., Any]] = {}
        for step in network.steps:
            if step.outputs[0] in layers:
                found = layers[step.outputs[0]]
                counted = Overflows(found.layer, step.operator)
                self._counts[step.outputs[0]] = counted
                changed[step.outputs[0]] = _saturating(step, counted, found.shift)
        self.module = Normalized(network.with_functions(changed), twin.normalization).eval().requires_grad_(False)
        """Pixels float32 [n, C, H, W] in [0, 1] to logits; gradients are those of the exact sums."""

    @property
    def layers(self) -> tuple[Overflows, ...]:
        """Of the layers that were emulated, over all images so far."""
        return tuple(counted for counted in self._counts.values() if counted.pairs)

    @property
    def spared(self) -> tuple[Spared, ...]:
        """The other layers; complete once images were run."""
        missed = [
            Spared(counted.layer, "not emulated: its factors are no plain integers here")
            for counted in self._counts.values()
            if not counted.pairs
        ]
        return (*self._spared, *missed)

    def predict(self, images: Tensor) -> Tensor:
        """Logits float32 [n, classes] of images float32 [n, C, H, W] in [0, 1]."""
        with torch.inference_mode():
            found: Tensor = self.module(images)
        return found


def twin_of_session(
    path: Path,
    interface: GraphInterface | None = None,
    *,
    input_shape: tuple[int, int, int] | None = None,
    provider: Provider = "cpu",
) -> Twin:
    """The twin of a file as ONNX Runtime computes it on this machine: where its kernels saturate, the twin does.

    Args:
        path: like `interface`, `input_shape` and what it raises as in `build_twin`.
        interface: how it is fed.
        input_shape: (channels, height, width).
        provider: what runs the file; only the CPU's kernels saturate.
    """
    twin = build_twin(path, interface, input_shape=input_shape)
    if not (twin.quantised and provider == "cpu" and saturates_here()):
        return twin
    channels, height, width = twin.input_shape
    image = (height, width, channels) if twin.interface.layout == "NHWC" else twin.input_shape
    return replace(twin, module=SaturatingTwin(twin, path, integer_coverage(path, image=image)).module)


def _saturating(step: Step, counted: Overflows, shift: int = 0) -> Callable[..., Any]:
    """The step's function, with saturation of products with activations that are `shift` larger than in the graph."""
    clip = _clip_convolution if step.operator == "Conv" else _clip_product

    def layer(first: Any, second: Any, *rest: Any) -> Any:
        sums = step.function(first, second, *rest)
        if not all(isinstance(value, Scaled) for value in (sums, first, second)) or not sums.values.numel():
            return sums
        with torch.no_grad():
            moved = first._replace(zero_point=first.zero_point + shift)
            off = clip(moved, second, step.attributes, counted)
        counted.pairs += sums.values.numel() * -(-_length(second.values, step) // 2)
        return sums if off is None else sums._replace(values=sums.values - off.to(sums.values))

    return layer


def _length(weight: Tensor, step: Step) -> int:
    """Of the reduction axis."""
    if step.operator == "Conv":
        return math.prod(weight.shape[1:])
    return int(weight.shape[1 if step.attributes.get("transB", 0) else 0])


def _clip_convolution(
    image: Scaled, weight: Scaled, attributes: Mapping[str, Any], counted: Overflows
) -> Tensor | None:
    kernel = weight.values + weight.zero_point
    sizes, spatial = kernel.shape[2:], range(kernel.ndim - 2)
    strides, dilations = (attributes.get(name) or [1 for _ in spatial] for name in ("strides", "dilations"))
    before, after = padding(
        image.values.shape[2:], sizes, strides, dilations, attributes.get("auto_pad", "NOTSET"), attributes.get("pads")
    )
    raw = pad_spatial(image.values, before, after) + image.zero_point
    channels, per_group = kernel.shape[:2]
    group_of = torch.arange(channels) // (channels // attributes.get("group", 1))
    ordered = kernel.flatten(2).transpose(1, 2).flatten(1)  # kernel positions, then channels
    largest = raw.amax((0, *(axis + 2 for axis in spatial))).reshape(-1, per_group)[group_of]
    pairs = risky_pairs(ordered, largest.repeat(1, math.prod(sizes)))
    if not len(pairs.channel):
        return None
    out = [
        (size - (width - 1) * dilation - 1) // stride + 1
        for size, width, dilation, stride in zip(raw.shape[2:], sizes, dilations, strides, strict=True)
    ]
    windows = _Windows(sizes, strides, dilations, out)
    # Rows are named by kernel position and by channel of the whole image.
    rows = pairs.position // per_group * raw.shape[1] + pairs.position % per_group
    rows += group_of[pairs.channel, None] * per_group
    needed, index = torch.unique(rows, return_inverse=True)
    pairs = RiskyPairs(pairs.channel, index, pairs.weights)
    taken = []
    for images in torch.split(raw, max(1, BLOCK // (max(len(needed), channels) * math.prod(out)))):
        off, overflows = clipped_off(windows.rows(images, needed), pairs, channels)
        taken.append(off.reshape(channels, len(images), *out).transpose(0, 1))
        counted.overflows += overflows
    return torch.cat(taken)


@dataclass(frozen=True)
class _Windows:
    """What of a padded image the filters of a convolution meet."""

    sizes: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    out: Sequence[int]

    def rows(self, images: Tensor, needed: Tensor) -> Tensor:
        """Rows [m, n * places] of images [n, C, ...], named by (kernel position * C + channel)."""
        found = []
        for row in needed.tolist():
            spot, channel = divmod(row, images.shape[1])
            view = images[:, channel]
            for axis in range(len(self.sizes) - 1, -1, -1):
                spot, step = divmod(spot, self.sizes[axis])
                stride = self.strides[axis]
                start = step * self.dilations[axis]
                chosen = slice(start, start + (self.out[axis] - 1) * stride + 1, stride)
                view = view[(slice(None),) * (axis + 1) + (chosen,)]
            found.append(view.flatten())
        return torch.stack(found)


def _clip_product(first: Scaled, second: Scaled, attributes: Mapping[str, Any], counted: Overflows) -> Tensor | None:
    weight = second.values + second.zero_point
    rows = weight if attributes.get("transB", 0) else weight.T  # [channels, K]
    raw = (first.values + first.zero_point).reshape(-1, rows.shape[1])
    pairs = risky_pairs(rows, raw.amax(0))
    if not len(pairs.channel):
        return None
    off, overflows = clipped_off(raw.T, pairs, len(rows))
    counted.overflows += overflows
    return off.T.reshape(*first.values.shape[:-1], len(rows))
