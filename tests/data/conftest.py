from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from toolkit.artifacts import UInt8Array

MakeFolder = Callable[..., Path]


def random_pixels(seed: int, *shape: int) -> UInt8Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Write random PNG files, `per_class` for each of `classes`, below tmp_path / name."""

    def make(
        name: str,
        *,
        classes: tuple[str, ...] = ("cat", "dog"),
        per_class: int = 4,
        mode: str = "RGB",
        size: tuple[int, int] = (8, 8),
    ) -> Path:
        root = tmp_path / name
        for label in classes:
            (root / label).mkdir(parents=True)
            for number in range(per_class):
                seed = zlib.crc32(f"{name}/{label}/{number}".encode())
                shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
                Image.fromarray(random_pixels(seed, *shape)).save(root / label / f"{number:03}.png")
        return root

    return make
