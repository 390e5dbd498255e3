"""Operators of ONNX that move values or compute with shapes; shapes are int64 tensors on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Ints = Sequence[int] | Tensor | None


def ints(value: Ints) -> list[int] | None:
    """Whole numbers of an attribute or of an input; None if there are none."""
    if value is None:
        return None
    return [int(number) for number in value.flatten().tolist()] if isinstance(value, Tensor) else list(value)


def shape(value: Any, *, start: int = 0, end: int | None = None) -> Tensor:
    """Shape."""
    return torch.tensor(list(value.shape)[start:end], dtype=torch.int64)


def reshape(value: Tensor, target: Tensor, *, allowzero: int = 0) -> Tensor:
    """Reshape; without `allowzero` a 0 copies the axis."""
    sizes = [int(size) for size in target.tolist()]
    if not allowzero:
        sizes = [value.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return value.reshape(sizes)


def flatten(value: Tensor, *, axis: int = 1) -> Tensor:
    """Flatten to two axes."""
    axis = axis + value.ndim if axis < 0 else axis
    return value.reshape(math.prod(value.shape[:axis]), math.prod(value.shape[axis:]))


def transpose(value: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Transpose; without `perm` all axes are reversed."""
    return value.permute(list(perm) if perm is not None else list(range(value.ndim))[::-1])


def squeeze(value: Tensor, given: Tensor | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    """Squeeze; axes are an input since opset 13."""
    chosen = ints(given if given is not None else axes)
    return value.squeeze() if chosen is None else value.squeeze(tuple(chosen))


def unsqueeze(value: Tensor, given: Tensor | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    """Unsqueeze; axes are an input since opset 13, and count in the result."""
    chosen = ints(given if given is not None else axes) or []
    rank = value.ndim + len(chosen)
    for axis in sorted(number % rank for number in chosen):
        value = value.unsqueeze(axis)
    return value


def split(
    value: Tensor, given: Tensor | None = None, *, axis: int = 0, split: Sequence[int] | None = None, parts: int
) -> tuple[Tensor, ...]:
    """Split into `parts`, of equal size (the last may be smaller) where no sizes are given."""
    sizes = ints(given if given is not None else split)
    return torch.split(value, sizes or math.ceil(value.shape[axis] / parts), axis)


def slice_(
    value: Tensor, starts: Tensor | None = None, ends: Tensor | None = None, axes: Tensor | None = None,
    steps: Tensor | None = None, **attributes: Sequence[int],
) -> Tensor:  # fmt: skip
    """Slice; its numbers are inputs since opset 10."""
    first = ints(starts if starts is not None else attributes["starts"]) or []
    last = ints(ends if ends is not None else attributes["ends"]) or []
    along = ints(axes if axes is not None else attributes.get("axes")) or list(range(len(first)))
    stride = ints(steps) or [1] * len(first)
    for begin, end, axis, step in zip(first, last, along, stride, strict=True):
        value = _slice_axis(value, begin, end, axis, step)
    return value


def _slice_axis(value: Tensor, begin: int, end: int, axis: int, step: int) -> Tensor:
    size = value.shape[axis]
    if step > 0:
        begin, end, _ = slice(begin, end, step).indices(size)
        chosen = value.narrow(axis, begin, max(0, end - begin))
        if step == 1:
            return chosen
        return chosen.index_select(axis, torch.arange(0, chosen.shape[axis], step, device=value.device))
    positions = range(*slice(begin, end if end >= -size else None, step).indices(size))
    return value.index_select(axis, torch.tensor(list(positions), dtype=torch.int64, device=value.device))


def gather(value: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    """Gather; negative indices count from the end."""
    axis = axis % value.ndim
    if index.ndim == 0:
        return value.select(axis, int(index))
    flat = index.flatten().to(value.device, torch.int64)
    flat = torch.where(flat < 0, flat + value.shape[axis], flat)
    found = value.index_select(axis, flat)
    return found.reshape(*value.shape[:axis], *index.shape, *value.shape[axis + 1 :])


def gather_elements(value: Tensor, index: Tensor, *, axis: int = 0) -> Tensor:
    """GatherElements."""
    index = index.to(value.device)
    return value.gather(axis, torch.where(index < 0, index + value.shape[axis], index))


def scatter_nd(value: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    """ScatterND without reduction."""
    positions = index.to(value.device).unbind(-1)
    return value.index_put(positions, updates.to(value))


def concat(*values: Tensor, axis: int) -> Tensor:
    """Concat."""
    return torch.cat(values, axis)


def expand(value: Tensor, target: Tensor) -> Tensor:
    """Expand; broadcasts both ways."""
    wanted = [int(size) for size in target.tolist()]
    own = [1] * (len(wanted) - value.ndim) + list(value.shape)
    wanted = [1] * (len(own) - len(wanted)) + wanted
    return value.expand([size if want == 1 else want for size, want in zip(own, wanted, strict=True)])


def tile(value: Tensor, repeats: Tensor) -> Tensor:
    """Tile."""
    return value.repeat(tuple(int(count) for count in repeats.tolist()))


PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def pad(
    value: Tensor, given: Tensor | None = None, fill: Tensor | None = None, axes: Tensor | None = None, *,
    mode: str = "constant", pads: Sequence[int] | None = None, constant: float = 0.0,
) -> Tensor:  # fmt: skip
    """Pad; the pads are an input since opset 11."""
    sizes = ints(given if given is not None else pads) or []
    along = [axis % value.ndim for axis in ints(axes) or range(len(sizes) // 2)]
    flat = [0] * 2 * value.ndim
    for position, axis in enumerate(along):
        place = 2 * (value.ndim - 1 - axis)
        flat[place : place + 2] = sizes[position], sizes[position + len(along)]
    if mode == "constant":
        return functional.pad(value, flat, value=float(fill) if fill is not None else constant)
    while len(flat) > 2 * (value.ndim - 2) and flat[-2:] == [0, 0]:
        flat = flat[:-2]  # torch pads only trailing axes by reflection
    return functional.pad(value, flat, mode=PAD_MODES[mode])


def constant_of_shape(sizes: Tensor, *, value: Tensor | None = None) -> Tensor:
    """ConstantOfShape."""
    wanted = [int(size) for size in sizes.tolist()]
    return torch.zeros(wanted) if value is None else torch.full(wanted, value.item(), dtype=value.dtype)


def arange(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """Range."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def depth_to_space(image: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """DepthToSpace."""
    if mode == "CRD":
        return functional.pixel_shuffle(image, blocksize)
    n, channels, height, width = image.shape
    blocks = image.reshape(n, blocksize, blocksize, channels // blocksize**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(n, -1, height * blocksize, width * blocksize)


def space_to_depth(image: Tensor, *, blocksize: int) -> Tensor:
    """SpaceToDepth."""
    n, channels, height, width = image.shape
    blocks = image.reshape(n, channels, height // blocksize, blocksize, width // blocksize, blocksize)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, height // blocksize, width // blocksize)


def resize(
    image: Tensor, _: Tensor | None = None, factors: Tensor | None = None, sizes: Tensor | None = None, *,
    mode: str = "nearest", coordinates: str = "half_pixel",
) -> Tensor:  # fmt: skip
    """Resize of height and width, without antialiasing, in the forms that torch has."""
    if sizes is not None and sizes.numel():
        target = [int(size) for size in sizes.tolist()][2:]
    else:
        given = factors.tolist() if factors is not None else []
        exact = [size * factor for size, factor in zip(image.shape[2:], given[2:], strict=True)]
        target = [math.floor(size) for size in exact]
        if target != exact:  # the runtime keeps the factor, torch has another that fits the size
            raise ValueError(f"Resize by {given[2:]} of {list(image.shape[2:])} to no whole number of pixels")
    if mode == "nearest":
        return functional.interpolate(image, size=target, mode="nearest")
    corners = coordinates == "align_corners"
    kind = {"linear": "bilinear", "cubic": "bicubic"}[mode]
    return functional.interpolate(image, size=target, mode=kind, align_corners=corners)
