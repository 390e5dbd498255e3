"""Softmax of integers, as ONNX Runtime's QLinearSoftmax computes it.

It differs from the quantised softmax by more than rounding: the result is multiplied by the whole part of the inverse
scale, so that every share comes out smaller by up to `scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEVELS = 256
RESERVE = 5.0
"""Of the logarithm of the largest float32, which the kernel leaves free."""


@dataclass(frozen=True)
class SoftmaxKernel:
    """The kernel for one tensor."""

    integers: Tensor
    """What is dequantised, up to a shift."""
    scale: Tensor
    axis: int

    def positions(self, step: Tensor) -> Tensor:
        """What the kernel rounds, float32, shaped like its input.

        Args:
            step: scale of the result.
        """
        below = self.integers.amax(self.axis, keepdim=True) - self.integers
        shares = self._table()[(LEVELS - 1 - below).long().clamp_(0, LEVELS - 1)]
        total = torch.zeros_like(shares.select(self.axis, 0))
        for part in shares.unbind(self.axis):
            total = total + part
        return shares * torch.floor(1 / step.float()) / total.unsqueeze(self.axis)

    def _table(self) -> Tensor:
        """exp of every difference from the largest, times a factor that uses the range of float32, float32 [256]."""
        # The kernel takes this logarithm in float32, and its error shows in the table.
        largest = torch.tensor(torch.finfo(torch.float32).max) / self.integers.shape[self.axis]
        scale = float(self.scale)
        shift = max(0.0, float(largest.log()) - RESERVE) / scale
        steps = torch.arange(LEVELS, dtype=torch.float64, device=self.integers.device) - (LEVELS - 1)
        return torch.exp((steps + shift) * scale).float()


def take(position: Tensor, *_: float, kernel: SoftmaxKernel, step: Tensor) -> None:
    """Replace `position`, in steps of the quantiser, by what the kernel rounds, in place; the ends do not matter."""
    position.copy_(kernel.positions(step))


def is_whole(value: Any) -> bool:
    """Whether a dequantised tensor has one scale, and is computed in float32 (attacks may run in another precision)."""
    return bool(value.scale.numel() == 1 and value.values.dtype == torch.float32)
