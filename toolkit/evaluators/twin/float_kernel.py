"""The sums of ONNX Runtime's float convolution, bit by bit, where a quantiser behind it stands on the edge of rounding.

Of a quantised graph the runtime leaves some convolutions in float (on x86 most of those with int8 activations). Their
rounding errors are near 1e-6 of a step, yet one sum in 300,000 lies so close to the middle between two integers that
they decide, and a network without much margin makes other labels of it. What comes closer than the errors reach is
therefore summed again, in the order of the runtime's kernel (MLAS, `sgemm.cpp` and `convolve.cpp`): for every chunk of
terms one chain of fused multiply-adds. Elsewhere the exact sums of integers give the same integer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

UNIT_ROUNDOFF = 2.0**-24
"""Of float32."""
MARGIN = 4.0
"""Times the error to expect of a chain of sums: random signs, every partial sum as large as the largest result."""
CHUNK, COLUMNS, LEAST_COLUMNS = 128, 128, 16
"""Terms and columns that the kernel takes at a time, and the fewest columns for which it takes more terms instead."""


@dataclass(frozen=True)
class FloatKernel:
    """One convolution as the runtime's float kernel computes it, at single places of its output."""

    image: Tensor
    """Centred integers [n, C, ...]."""
    image_scale: Tensor
    weight: Tensor
    """Real numbers [channels, C / groups, ...]."""
    bias: Tensor | None
    """Real numbers [channels]."""
    padding: Sequence[int]
    """Before and after every spatial axis."""
    strides: Sequence[int]
    dilations: Sequence[int]
    groups: int
    shape: tuple[int, ...]
    """Of the output, [n, channels, ...]."""

    @property
    def terms(self) -> int:
        """How many products every output sums."""
        return math.prod(self.weight.shape[1:])

    def at(self, places: Sequence[Tensor]) -> Tensor:
        """The kernel's results, float32 [m], at places of its output: int64 [m] for every axis."""
        batch, channel, *spatial = places
        image = functional.pad(self.image, [size for size in reversed(self.padding) for _ in range(2)]).contiguous()
        steps = image.stride()
        per_group = self.shape[1] // self.groups
        group = torch.div(channel, per_group, rounding_mode="floor")
        first = batch * steps[0] + group * (self.weight.shape[1] * steps[1])
        for position, stride, step in zip(spatial, self.strides, steps[2:], strict=True):
            first = first + position * (stride * step)
        terms = image.flatten()[first + self._offsets(steps)[:, None]] * self.image_scale
        products = terms.double() * self.weight.flatten(1)[channel].T.double()  # exact
        sums = _by_fours(products.float()) if per_group == 1 else _chained(products, self._chunk())
        return sums if self.bias is None else sums + self.bias[channel]

    def _offsets(self, steps: Sequence[int]) -> Tensor:
        """Distance of every term from an output's first one, in elements: channels outermost, as in the weights."""
        found = torch.zeros(1, dtype=torch.int64, device=self.image.device)
        distances = (steps[1], *(step * dilation for step, dilation in zip(steps[2:], self.dilations, strict=True)))
        for size, distance in zip(self.weight.shape[1:], distances, strict=True):
            found = (found[:, None] + torch.arange(size, device=found.device) * distance).flatten()
        return found

    def _chunk(self) -> int:
        chunk, columns, outputs = CHUNK, COLUMNS, math.prod(self.shape[2:])
        if outputs < self.terms:
            while columns > LEAST_COLUMNS and columns // 2 >= outputs:
                chunk, columns = chunk * 2, columns // 2
        return chunk


def _chained(products: Tensor, chunk: int) -> Tensor:
    """Sums float32 [m] of exact products float64 [terms, m]: fused multiply-adds, chunk after chunk."""
    total = torch.zeros_like(products[0], dtype=torch.float32)
    for part in torch.split(products, chunk):
        chain = torch.zeros_like(total)
        for product in part.unbind():
            chain = (product + chain).float()
        total = total + chain
    return total


def _by_fours(products: Tensor) -> Tensor:
    """Sums float32 [m] of rounded products [terms, m] as the kernel for a single row makes them: by fours, two, one."""
    total = torch.zeros_like(products[0])
    whole = len(products) // 4 * 4
    for part in (*torch.split(products[:whole], 4), *torch.split(products[whole:], 2)):
        for_part = torch.zeros_like(total)
        for product in part.unbind():
            for_part = for_part + product
        total = total + for_part
    return total


def settle_ties(position: Tensor, low: float, high: float, *, kernel: FloatKernel, step: Tensor) -> None:
    """Replace what lies near the middle between two integers by what the float kernel computes there, in place.

    Args:
        position: [n, channels, ...] in steps of the quantiser; float32.
        low: least integer.
        high: largest integer: beyond both the quantiser clips, however the sum was rounded.
        kernel: of the convolution that made it.
        step: the quantiser's scale.
    """
    reach = MARGIN * math.sqrt(kernel.terms) * UNIT_ROUNDOFF * position.abs().amax()
    near = ((position - position.floor() - 0.5).abs_() < reach) & (position > low) & (position < high)
    places = near.nonzero(as_tuple=True)
    if len(places[0]):
        position[places] = kernel.at(places) / step
