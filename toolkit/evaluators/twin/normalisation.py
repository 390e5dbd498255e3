"""Layer normalisation with the very roundings of ONNX Runtime's kernel, which decide near ties of the quantiser behind.

The order of its operations was found by experiment: the mean is summed without visible error, the squares of the
centred values run through eight chains of fused multiply-adds, and the scale and shift are one more of these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LANES = 8


class _Replaced(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(_: Any, _smooth: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def with_kernel_rounding(smooth: Tensor, value: Tensor, scale: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """What ONNX Runtime's kernel gives for `value`, normalised over its last axis; the gradient is that of `smooth`.

    Args:
        smooth: the same by torch. Given back as it is where the kernel's order is not known: other precisions than
            float32, widths that are no multiple of 8.
        value: [..., width].
        scale: [width].
        bias: [width].
        epsilon: added to the variance.
    """
    width = value.shape[-1]
    if value.dtype != torch.float32 or width % LANES:
        return smooth
    with torch.no_grad():
        centred = value - value.double().mean(-1, keepdim=True).float()
        squares = centred.double().square_().reshape(*value.shape[:-1], width // LANES, LANES)
        chain = torch.zeros_like(squares[..., 0, :], dtype=torch.float32)
        for part in squares.unbind(-2):
            chain = (part + chain).float()
        while chain.shape[-1] > 1:
            low, high = chain.chunk(2, -1)
            chain = low + high
        # torch does not round the square root of float32 correctly.
        normalised = centred * (1 / torch.sqrt((chain / width + epsilon).double()).float())
        exact = normalised * scale if bias is None else (normalised.double() * scale + bias).float()
    found: Tensor = _Replaced.apply(smooth, exact)
    return found
