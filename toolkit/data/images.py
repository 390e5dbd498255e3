"""Image sets: arrays in memory, and image folders in memory or streamed from disk."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from toolkit.artifacts import HashArray, Int64Array, UInt8Array
from toolkit.data.decoding import GREY_MODES, SUFFIXES, Rejects, decode_files
from toolkit.data.hashing import hash_image, hash_images
from toolkit.errors import ToolkitError
from toolkit.paths import is_text

MEMORY_LIMIT = 2**30
"""Bytes of decoded pixels up to which a folder is held in memory."""

SAMPLED = 256
"""Number of files, evenly spread over a folder, that decide between grey and RGB."""


class ArrayImages:
    """Labelled images held in memory.

    Args:
        name: what the images are called in messages.
        class_names: the name of each class, in order of the labels.
        array: uint8 [N, C, H, W], 0 to 255; C is 1 or 3.
        labels: integers [N], 0 to len(class_names) - 1.

    Raises:
        ToolkitError: the type, the shape or the labels do not fit.
    """

    def __init__(
        self, name: str, class_names: Sequence[str], array: npt.NDArray[np.generic], labels: npt.NDArray[np.generic]
    ) -> None:
        _check_pixels(name, array)
        _check_labels(name, labels, len(array), len(class_names))
        self.name = name
        self.class_names = tuple(class_names)
        self.labels: Int64Array = labels.astype(np.int64)
        self._array: UInt8Array = np.ascontiguousarray(array, dtype=np.uint8)

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self._array.shape
        return channels, height, width

    @cached_property
    def hashes(self) -> HashArray:
        """64 bits of BLAKE2b over each image's pixels in the order C, H, W."""
        return hash_images(self._array)

    def pixels(self, indices: Int64Array) -> UInt8Array:
        """The images at `indices`, uint8 [n, C, H, W]."""
        return self._array[indices]


def _check_pixels(name: str, array: npt.NDArray[np.generic]) -> None:
    if array.dtype != np.uint8:
        raise ToolkitError(
            f"the pixels of {name} are not bytes",
            found=f"an array of {array.dtype}",
            fix="store uint8 from 0 to 255, e.g. `(x * 255).round().astype('uint8')` for pixels in [0, 1]",
        )
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise ToolkitError(
            f"the images of {name} have no usable shape",
            found=f"an array of shape {array.shape}",
            fix="store [images, channels, height, width] with 1 (grey) or 3 (RGB) channels and at least one image",
        )


def _check_labels(name: str, labels: npt.NDArray[np.generic], images: int, classes: int) -> None:
    fix = "store one integer label per image, from 0 on"
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (images,):
        found = f"labels of type {labels.dtype} and shape {labels.shape} for {images} images"
        raise ToolkitError(f"the labels of {name} do not fit its images", found=found, fix=fix)
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        found = f"labels from {low} to {high} for {classes} classes"
        raise ToolkitError(f"the labels of {name} do not fit its classes", found=found, fix=fix)


class FolderImages:
    """The images of a folder with one subfolder per class, all brought to one shape.

    Files may lie in folders below their class. Images are grey if all sampled ones are, else RGB; palettes and
    transparency are converted, 16-bit grey is scaled to 8 bits.

    Args:
        root: the folder.
        class_names: the classes in order of their labels (those of the training part, for a test part); None: the
            sorted names of the subfolders.
        size: the shorter side of every image is resized to it, then the centre is cropped to a square; None: all
            images have one size already.
        channels: 1 or 3; None: decided from the files.
        memory_limit: bytes of decoded pixels up to which all images are held in memory; larger folders are
            decoded from disk at every request, and once at first to hash their pixels.

    Raises:
        ToolkitError: no folder, no images, an unknown class, files that cannot be read, images of several sizes.
    """

    def __init__(
        self,
        root: Path,
        *,
        class_names: Sequence[str] | None = None,
        size: int | None = None,
        channels: int | None = None,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        found = _files_by_class(root, class_names)
        self.name = str(root)
        self.class_names = tuple(found) if class_names is None else tuple(class_names)
        self._root, self._size = root, size
        self._files = [file for files in found.values() for file in files]
        codes = np.array([self.class_names.index(name) for name in found], dtype=np.int64)
        self.labels: Int64Array = np.repeat(codes, [len(files) for files in found.values()])
        self.shape = self._probe(channels)
        self._array: UInt8Array | None = None
        if len(self._files) * int(np.prod(self.shape)) <= memory_limit:
            self._array = self._decode(self._files, tell=True)
            self.hashes = hash_images(self._array)
        else:
            self.hashes = self._hash_files()

    @property
    def streamed(self) -> bool:
        """Whether images are decoded from disk at every request."""
        return self._array is None

    def pixels(self, indices: Int64Array) -> UInt8Array:
        """The images at `indices`, uint8 [n, C, H, W].

        Raises:
            ToolkitError: files of a streamed folder cannot be read.
        """
        if self._array is not None:
            return self._array[indices]
        return self._decode([self._files[index] for index in indices])

    def _decode(self, files: Sequence[str], *, tell: bool = False) -> UInt8Array:
        out = np.empty((len(files), *self.shape), dtype=np.uint8)
        decode_files(self._root, files, self.shape, self._size, out.__setitem__, tell=tell)
        return out

    def _hash_files(self) -> HashArray:
        """The hashes of all images as used (decoded, resized), in one pass that keeps no pixels.

        Of the files' bytes it would be faster, but a copy saved with another compression would pass as another image.
        """
        hashes = np.empty(len(self._files), dtype=np.uint64)

        def store(index: int, pixels: UInt8Array) -> None:
            hashes[index] = hash_image(pixels)

        decode_files(self._root, self._files, self.shape, self._size, store, task="hashing", tell=True)
        return hashes

    def _probe(self, channels: int | None) -> tuple[int, int, int]:
        """The shape of all images, from the headers of some; without `size` the commonest size counts."""
        rejects = Rejects(self._root)
        spread = np.unique(np.linspace(0, len(self._files) - 1, SAMPLED).astype(np.int64))
        modes: Counter[str] = Counter()
        sizes: Counter[tuple[int, int]] = Counter()
        for file in (self._files[index] for index in spread):
            with rejects.catch(file), Image.open(self._root / file) as image:
                modes[image.mode] += 1
                sizes[image.size] += 1
        if not sizes:
            rejects.raise_any(len(spread), (0, 0))
        width, height = (self._size, self._size) if self._size else sizes.most_common(1)[0][0]
        coloured = sum(count for mode, count in modes.items() if mode not in GREY_MODES)
        return channels or (3 if coloured else 1), height, width


def _files_by_class(root: Path, class_names: Sequence[str] | None) -> dict[str, list[str]]:
    """Image files by class, as sorted paths relative to `root`; classes in sorted order."""
    layout = f"put images into one folder per class: {root.name}/CLASS/IMAGE, IMAGE ending in {' '.join(SUFFIXES)}"
    if not root.is_dir():
        raise ToolkitError("there is no such image folder", found=str(root), fix=layout)
    try:
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise ToolkitError(
            "the image folder cannot be opened", found=f"{root}: {error.strerror}", fix=layout
        ) from error
    strange = [name for name in (str(root), *names) if not is_text(name)]
    if strange:
        raise ToolkitError(
            "a folder's name is not UTF-8, so that no report could name it",
            found=", ".join(map(ascii, strange[:5])),
            fix="rename it, for example with `convmv -f latin1 -t utf8`",
        )
    unknown = [name for name in names if class_names is not None and name not in class_names]
    if unknown:
        raise ToolkitError(
            f"{root} holds classes that the training images lack",
            found=", ".join(unknown[:5]),
            fix="give train/ and test/ the same class folders",
        )
    found = {name: _image_files(root, name) for name in names}
    if not any(found.values()):
        raise ToolkitError("the folder holds no images", found=f"{root}: {len(names)} class folders", fix=layout)
    empty = [name for name, files in found.items() if not files]
    if empty:
        raise ToolkitError(f"class folders of {root} hold no images", found=", ".join(empty[:5]), fix=layout)
    return found


def _image_files(root: Path, name: str) -> list[str]:
    def refuse(error: OSError) -> None:
        raise ToolkitError(
            "a folder of images cannot be opened",
            found=f"{error.filename}: {error.strerror}",
            fix="make it readable, or move it away",
        ) from error

    files: list[str] = []
    seen: set[str] = set()
    for folder, below, members in os.walk(root / name, onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # links may form a ring
            below.clear()
            continue
        seen.add(real)
        below[:] = [entry for entry in below if not entry.startswith(".")]
        relative = Path(folder).relative_to(root)
        images = (member for member in members if member.lower().endswith(SUFFIXES) and not member.startswith("."))
        files.extend((relative / member).as_posix() for member in images)
    return sorted(files)
