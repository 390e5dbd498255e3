"""Convolutions, pooling and normalisation of ONNX in torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from toolkit.evaluators.twin.float_kernel import FloatKernel
from toolkit.evaluators.twin.normalisation import with_kernel_rounding
from toolkit.evaluators.twin.quantised import integer_bias, layer_scale
from toolkit.evaluators.twin.values import Scaled, along, plain

CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
MAX_POOLS = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
AVERAGE_POOLS = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def padding(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int],
    auto_pad: str, pads: Sequence[int] | None,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """(before, after) for every spatial axis, by the rules of ONNX."""
    rank = len(kernel)
    if auto_pad in ("NOTSET", "VALID"):
        given = list(pads) if pads and auto_pad == "NOTSET" else [0] * 2 * rank
        return given[:rank], given[rank:]
    before, after = [], []
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        needed = max(0, (math.ceil(size / stride) - 1) * stride + (width - 1) * dilation + 1 - size)
        small, large = needed // 2, needed - needed // 2
        before.append(small if auto_pad == "SAME_UPPER" else large)
        after.append(large if auto_pad == "SAME_UPPER" else small)
    return before, after


def pad_spatial(values: Tensor, before: Sequence[int], after: Sequence[int], fill: float = 0.0) -> Tensor:
    """`values` [n, C, ...] with every spatial axis padded."""
    flat = [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair]
    return functional.pad(values, flat, value=fill) if any(flat) else values


def convolution(
    image: Any, weight: Any, bias: Any = None, *, aligned: bool = False, in_float: bool = False,
    strides: Sequence[int] | None = None, dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None, group: int = 1, auto_pad: str = "NOTSET",
) -> Any:  # fmt: skip
    """Conv; of scaled tensors the sums of the integers, scaled, which is what QLinearConv computes before it rounds.

    Args:
        image: [n, C, ...].
        weight: [channels, C / group, ...].
        bias: [channels].
        aligned: a quantised bias is in units of the sums.
        in_float: the runtime has no integer kernel for this one.
        strides: and the rest: attributes of the node.
    """
    scale = None
    if isinstance(image, Scaled) and isinstance(weight, Scaled):
        scale = layer_scale(image, weight, image.values.ndim, 1)
    if scale is None:
        values, kernel, units = plain(image), plain(weight), plain(bias)
    else:
        values, kernel = image.values, weight.values
        exact = plain(bias) if in_float and not aligned else bias  # only integer kernels round it to their units
        units = integer_bias(exact, scale, aligned=aligned)
    rank = kernel.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    before, after = padding(values.shape[2:], kernel.shape[2:], strides, dilations, auto_pad, pads)
    if before != after:
        values, before = pad_spatial(values, before, after), [0] * rank
    sums = CONVOLUTIONS[rank](values, kernel, units, list(strides), before, list(dilations), group)
    if scale is None:
        return sums
    if not in_float or sums.dtype != torch.float32:
        return Scaled(sums, scale)
    real = plain(weight), plain(bias)
    kernel = FloatKernel(
        values.detach(), image.scale, *real, before, strides, dilations, group, tuple(sums.shape)
    )  # fmt: skip
    return Scaled(sums, scale, kernel=kernel)


def transposed_convolution(
    image: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    strides: Sequence[int] | None = None, dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None, output_padding: Sequence[int] | None = None, group: int = 1,
) -> Tensor:  # fmt: skip
    """ConvTranspose with explicit, symmetric padding."""
    rank = weight.ndim - 2
    found: Tensor = TRANSPOSED[rank](
        image, weight, bias, list(strides or [1] * rank), list(pads or [0] * rank)[:rank],
        list(output_padding or [0] * rank), group, list(dilations or [1] * rank),
    )  # fmt: skip
    return found


def max_pool(
    image: Tensor, *, kernel_shape: Sequence[int], strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None, dilations: Sequence[int] | None = None, ceil_mode: int = 0,
    auto_pad: str = "NOTSET",
) -> Tensor:  # fmt: skip
    """MaxPool, its first output."""
    rank = len(kernel_shape)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    before, after = padding(image.shape[2:], kernel_shape, strides, dilations, auto_pad, pads)
    if before != after or any(2 * size > width for size, width in zip(before, kernel_shape, strict=True)):
        image, before = pad_spatial(image, before, after, -math.inf), [0] * rank
    found: Tensor = MAX_POOLS[rank](
        image, list(kernel_shape), list(strides), before, list(dilations), bool(ceil_mode)
    )  # fmt: skip
    return found


def average_pool(
    image: Tensor, *, kernel_shape: Sequence[int], strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None, ceil_mode: int = 0, count_include_pad: int = 0, auto_pad: str = "NOTSET",
) -> Tensor:  # fmt: skip
    """AveragePool without dilation."""
    rank = len(kernel_shape)
    strides = strides or [1] * rank
    before, after = padding(image.shape[2:], kernel_shape, strides, [1] * rank, auto_pad, pads)
    pool = AVERAGE_POOLS[rank]
    shape, step, ceil = list(kernel_shape), list(strides), bool(ceil_mode)
    if before == after and all(2 * size <= width for size, width in zip(before, kernel_shape, strict=True)):
        same: Tensor = pool(image, shape, step, before, ceil, bool(count_include_pad))
        return same
    padded = pad_spatial(image, before, after)
    found: Tensor = pool(padded, shape, step, 0, ceil)
    if count_include_pad:
        return found
    share: Tensor = pool(pad_spatial(torch.ones_like(image[:1, :1]), before, after), shape, step, 0, ceil)
    return found / share


def global_average_pool(image: Tensor) -> Tensor:
    """Mean over all spatial axes, kept with size 1."""
    return image.mean(dim=tuple(range(2, image.ndim)), keepdim=True)


def global_max_pool(image: Tensor) -> Tensor:
    """Maximum over all spatial axes, kept with size 1."""
    return image.amax(dim=tuple(range(2, image.ndim)), keepdim=True)


def batch_normalization(
    image: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, *, epsilon: float = 1e-5
) -> Tensor:
    """BatchNormalization at inference, first output."""
    # The operations of ONNX Runtime, in its order; torch's square root of float32 is not rounded correctly.
    factor = scale * (1 / torch.sqrt((variance + epsilon).double()).to(variance))
    shift = bias - mean * factor
    return image * along(factor, image.ndim, 1) + along(shift, image.ndim, 1)


def instance_normalization(image: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """InstanceNormalization."""
    return functional.instance_norm(image, weight=scale, bias=bias, eps=epsilon)


def layer_normalization(
    value: Tensor, scale: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5,
    quantised: bool = False,
) -> Tensor:  # fmt: skip
    """LayerNormalization, first output; `quantised`: with the runtime's own roundings, for the quantiser behind it."""
    shape = list(value.shape[axis:])
    if list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
        found = functional.layer_norm(value, shape, scale, bias, epsilon)
        one_axis = quantised and len(shape) == 1
        return with_kernel_rounding(found, value, scale, bias, epsilon) if one_axis else found
    normalised = functional.layer_norm(value, shape, eps=epsilon) * scale
    return normalised if bias is None else normalised + bias


def rms_normalization(value: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5) -> Tensor:
    """RMSNormalization."""
    return functional.rms_norm(value, list(value.shape[axis:]), eps=epsilon) * scale


def group_normalization(
    image: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5
) -> Tensor:
    """GroupNormalization with scale and bias per channel (opset 21) or per group (opset 18)."""
    if scale.numel() != image.shape[1]:
        repeats = image.shape[1] // num_groups
        scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
    return functional.group_norm(image, num_groups, scale, bias, epsilon)


def local_response_normalization(
    image: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    """LRN across channels (Krizhevsky et al. 2012)."""
    return functional.local_response_norm(image, size, alpha, beta, bias)
