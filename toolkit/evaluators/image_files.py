"""Attacks that survive the file format: attacked images as 8-bit PNG files, read back."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from toolkit.artifacts import Normalization
from toolkit.attacks.threat import ThreatModel
from toolkit.errors import ToolkitError

LEVELS = 255.0
SLACK = 1e-4
"""Of a grey level: what rounding in float32 may take from a perturbation that is a whole number of levels."""
WRITABLE_CHANNELS = (1, 3)


def to_levels(attacked: Tensor, images: Tensor, threat: ThreatModel, normalization: Normalization) -> Tensor:
    """Attacked images on the 256 grey levels, uint8 [n, C, H, W], still within the threat model.

    In l-inf the perturbation is rounded to the nearest level within the ball; in the other norms towards zero.

    Args:
        attacked: float32 [n, C, H, W] on the CPU.
        images: float32 [n, C, H, W], the clean images, themselves on grey levels.
        threat: the ball; whatever it says of clipping, a file holds no pixels outside [0, 1].
        normalization: for a ball that lies behind it.
    """
    delta = (attacked - images) * LEVELS
    if threat.norm == "linf":
        reach = (threat.eps * threat.pixel_scale(normalization) * LEVELS + SLACK).floor()
        delta = delta.round().clamp(-reach, reach)
    else:
        delta = (delta.abs() + SLACK).floor() * delta.sign()
    return (images * LEVELS + delta).round().clamp(0, LEVELS).to(torch.uint8)


def encode(levels: Tensor) -> bytes:
    """One image uint8 [C, H, W] as a PNG file."""
    pixels = levels.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def decode(file: bytes) -> Tensor:
    """A PNG file as float32 [C, H, W] in [0, 1]."""
    pixels = np.atleast_3d(np.asarray(Image.open(io.BytesIO(file))))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / LEVELS


class Gallery:
    """A folder of attacked images that fooled the deployed graph, one PNG file each.

    Args:
        folder: is made if need be; None: nothing is written.
        fresh: refuse a folder that has something in it.

    Raises:
        ToolkitError: the folder cannot be written, or is not empty.
    """

    def __init__(self, folder: Path | None, *, fresh: bool = False) -> None:
        self._folder = folder
        self._left_out: frozenset[int] = frozenset()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ToolkitError(
                    "the attacked images cannot be kept",
                    found=f"--save-adversarial {folder}: {error.strerror}",
                    fix="name a folder that can be written",
                ) from error
            if fresh and any(folder.iterdir()):
                raise ToolkitError(
                    "the folder for attacked images is not empty, and they would not be told from what is in it",
                    found=f"--save-adversarial {folder}",
                    fix="name another folder, or empty it",
                )

    def leave_out(self, indices: Iterable[int]) -> None:
        """Images that are misclassified without an attack: what is made of them proves nothing."""
        self._left_out = frozenset(indices)

    def keep(self, file: bytes, *, index: int, label: int) -> None:
        """Write one image under its position among the evaluation images and its true class."""
        if self._folder is not None and index not in self._left_out:
            (self._folder / f"{index:06d}-class{label}.png").write_bytes(file)
