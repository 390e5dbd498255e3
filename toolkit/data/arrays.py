"""NumPy archives of images: `npz:FILE`."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolkit.data.images import ArrayImages
from toolkit.errors import ToolkitError

AnyArray = npt.NDArray[np.generic]
FiveArrays = tuple[AnyArray, AnyArray, AnyArray, AnyArray, AnyArray | None]

KEYS = (("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels"))
"""Names of the four arrays: the common ones, and those of MedMNIST."""

NEEDED = "store the arrays x_train, y_train, x_test, y_test with numpy.savez_compressed"


@dataclass(frozen=True)
class NpzParts:
    """The two parts of an archive."""

    train: ArrayImages
    test: ArrayImages


def read_npz(path: Path, name: str) -> NpzParts:
    """Read an archive of uint8 images [N, H, W], [N, H, W, C] or [N, C, H, W], and integer labels [N] or [N, 1].

    Classes are named by the optional array `class_names`, else by their numbers. Pickled objects are never read.

    Raises:
        ToolkitError: the file is missing, is no archive, lacks an array, or holds one of no usable type or shape.
    """
    x_train, y_train, x_test, y_test, names = _arrays(path)
    classes = _class_names(names, y_train, name)
    train = ArrayImages(name, classes, channels_first(x_train, name), _flat(y_train))
    test = ArrayImages(f"{name} (test part)", classes, channels_first(x_test, name), _flat(y_test))
    if train.shape != test.shape:
        raise ToolkitError(
            f"the train and test images of {name} differ in shape",
            found=f"(channels, height, width) {train.shape} and {test.shape}",
            fix="store both parts with one shape",
        )
    return NpzParts(train, test)


def _arrays(path: Path) -> FiveArrays:
    if not path.is_file():
        raise ToolkitError("there is no such file", found=str(path), fix="name an existing archive: --data npz:FILE")
    try:
        # Opened here, not by NumPy, which leaves the files of broken archives open.
        with path.open("rb") as file:
            return _choose(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ToolkitError(
            "the archive cannot be read",
            found=f"{path}: {str(error)[:100] or type(error).__name__}",
            fix=f"{NEEDED}, as plain numbers (no objects)",
        ) from error


def _choose(archive: Any) -> FiveArrays:
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ToolkitError("the file holds one array, not an archive", found=f"shape {archive.shape}", fix=NEEDED)
    keys = next((keys for keys in KEYS if set(keys) <= set(archive.files)), None)
    if keys is None:
        found = ", ".join(archive.files[:8]) or "no arrays"
        raise ToolkitError("the archive lacks arrays of images and labels", found=found, fix=NEEDED)
    x_train, y_train, x_test, y_test = (archive[key] for key in keys)
    return x_train, y_train, x_test, y_test, archive.get("class_names")


def _class_names(names: AnyArray | None, labels: AnyArray, name: str) -> tuple[str, ...]:
    if names is None:
        present = np.unique(labels) if np.issubdtype(labels.dtype, np.integer) else np.arange(1)
        if not np.array_equal(present, np.arange(len(present))):
            raise ToolkitError(
                f"the labels of {name} do not number the classes from 0",
                found=f"{len(present)} different training labels from {present[0]} to {present[-1]}",
                fix="number the classes 0, 1, 2, ... without a gap, or name all of them in class_names",
            )
        return tuple(str(number) for number in range(len(present)))
    if names.ndim != 1 or names.dtype.kind != "U" or len(set(names.tolist())) != len(names):
        raise ToolkitError(
            f"the class names of {name} are not usable",
            found=f"class_names of type {names.dtype} and shape {names.shape}",
            fix="store one distinct name per class, as an array of text",
        )
    return tuple(names.tolist())


def _flat(labels: AnyArray) -> AnyArray:
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def channels_first(array: AnyArray, name: str) -> AnyArray:
    """Bring [N, H, W], [N, H, W, C] or [N, C, H, W] (C is 1 or 3) to [N, C, H, W]."""
    if array.ndim == 3:
        array = array[:, np.newaxis]
    elif array.ndim == 4:
        first, last = array.shape[1] in (1, 3), array.shape[3] in (1, 3)
        if first and last:
            raise ToolkitError(
                f"the axes of {name} cannot be told apart",
                found=f"an array of shape {array.shape}: channels may stand second or last",
                fix="store images of at least 4x4 pixels as [images, channels, height, width]",
            )
        if last:
            array = np.moveaxis(array, 3, 1)
    return array
