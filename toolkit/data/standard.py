"""Fashion-MNIST and CIFAR-10 as found on this machine; downloaded only when asked."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import progress
from toolkit.artifacts import UInt8Array
from toolkit.data.images import ArrayImages
from toolkit.errors import ToolkitError
from toolkit.locks import locked

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's and Ubuntu's package `dataset-fashion-mnist` puts the files."""

FASHION_MNIST_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Digests of the unpacked files. MNIST's files bear the same names: only the contents tell them apart."""

IDX_HEADER = {"images": 16, "labels": 8}
"""Bytes before the data of an IDX file of three and of one dimension."""


LOCK = ".download.lock"
"""In the folder of downloads: whoever looks for a data set, and may download it, holds it."""


def cache_dir() -> Path:
    """Where downloads go unless `--data-dir` says otherwise."""
    return Path.home() / ".cache" / "onnx-hardening-toolkit"


def find_fashion_mnist(data_dir: Path | None) -> Path | None:
    """The first folder with the four files, packed or not: `--data-dir`, the system's, torchvision's layout."""
    torchvision = Path("FashionMNIST") / "raw"
    own = [data_dir] if data_dir else []
    places = [*own, DEBIAN_FASHION_MNIST, *(place / torchvision for place in (*own, cache_dir()))]
    return next((place for place in places if all(_packed(place, name) for name in FASHION_MNIST_SHA256)), None)


def _packed(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / f"{name}.gz", folder / name) if path.is_file()), None)


def read_fashion_mnist(data_dir: Path | None, *, download: bool) -> tuple[ArrayImages, ArrayImages]:
    """The 60,000 training and 10,000 test images of Fashion-MNIST (Xiao et al. 2017), grey, 28x28.

    Raises:
        ToolkitError: the data set is not there, cannot be downloaded, or its files are not the original ones.
    """
    if download:
        from torchvision.datasets import FashionMNIST

        folder = _fetch(find_fashion_mnist, FashionMNIST, data_dir, "Fashion-MNIST")
    else:
        folder = find_fashion_mnist(data_dir)
    if folder is None:
        raise ToolkitError(
            "Fashion-MNIST is not on this machine",
            found=f"none in {data_dir or DEBIAN_FASHION_MNIST} nor in {(data_dir or cache_dir()) / 'FashionMNIST'}",
            fix="install it (`apt-get install dataset-fashion-mnist`), name its folder with --data-dir DIR, let it be "
            "downloaded with --download, or use the embedded sample with --data sample",
        )
    parts = []
    for part in ("train", "t10k"):
        images, labels = (_read_idx(folder, f"{part}-{kind}") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        array = images.reshape(-1, 1, 28, 28)
        parts.append(ArrayImages("fashion-mnist", FASHION_MNIST_CLASSES, array, labels))
    return parts[0], parts[1]


def _read_idx(folder: Path, name: str) -> UInt8Array:
    path = _packed(folder, name) or folder / name
    try:
        packed = path.read_bytes()
        data = gzip.decompress(packed) if path.suffix == ".gz" else packed
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    if hashlib.sha256(data).hexdigest() != FASHION_MNIST_SHA256[name]:
        raise _damaged(path, "other contents than the original file's; MNIST's files have the same names")
    return np.frombuffer(data, dtype=np.uint8, offset=IDX_HEADER[name.split("-")[1]])


def _damaged(path: Path, found: str) -> ToolkitError:
    return ToolkitError(
        "a file of Fashion-MNIST is damaged or another data set's",
        found=f"{path}: {found}",
        fix="restore the file, or name another folder with --data-dir DIR",
    )


def find_cifar10(data_dir: Path | None) -> Path | None:
    """The first folder that holds CIFAR-10 as torchvision unpacks it: `--data-dir`, the cache."""
    places = [data_dir, cache_dir()] if data_dir else [cache_dir()]
    return next((place for place in places if (place / "cifar-10-batches-py").is_dir()), None)


def read_cifar10(data_dir: Path | None, *, download: bool) -> tuple[ArrayImages, ArrayImages]:
    """The 50,000 training and 10,000 test images of CIFAR-10 (Krizhevsky 2009), RGB, 32x32.

    Raises:
        ToolkitError: the data set is not there, cannot be downloaded, or its files are not the original ones.
    """
    from torchvision.datasets import CIFAR10

    folder = _fetch(find_cifar10, CIFAR10, data_dir, "CIFAR-10") if download else find_cifar10(data_dir)
    if folder is None:
        raise ToolkitError(
            "CIFAR-10 is not on this machine",
            found=f"no folder cifar-10-batches-py in {data_dir or cache_dir()}",
            fix="name the folder above cifar-10-batches-py with --data-dir DIR, let it be downloaded with --download, "
            "give image files as --data folder:DIR, or use the embedded sample of Fashion-MNIST with --data sample",
        )
    parts = []
    for train in (True, False):
        try:
            with warnings.catch_warnings():
                # The files are old pickles, checked by MD5 first, whose dtypes NumPy 2.4 and later warn about.
                warnings.simplefilter("ignore")
                original: Any = CIFAR10(folder, train=train)
        except (RuntimeError, OSError) as error:
            raise ToolkitError(
                "the files of CIFAR-10 are incomplete or damaged",
                found=f"{folder / 'cifar-10-batches-py'}: a file is missing or has another MD5 than the original",
                fix="restore the folder, or download it again with --download into an empty --data-dir DIR",
            ) from error
        array = np.ascontiguousarray(original.data.transpose(0, 3, 1, 2))
        parts.append(ArrayImages("cifar10", CIFAR10_CLASSES, array, np.array(original.targets, dtype=np.int64)))
    return parts[0], parts[1]


def _fetch(find: Callable[[Path | None], Path | None], dataset: Any, data_dir: Path | None, title: str) -> Path | None:
    """The folder of a data set, downloaded if it is not there; of several processes one downloads, the others wait."""
    folder = data_dir or cache_dir()
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # a folder that is only read holds the data set, or the download says why
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / LOCK, f"it may be downloading {title}"))
        if find(data_dir) is None:
            _download(dataset, folder, title)
        return find(data_dir)


def _download(dataset: Any, folder: Path, title: str) -> None:
    progress.notice(f"downloading {title} into {folder}")
    try:
        dataset(folder, download=True)
    except (RuntimeError, OSError) as error:
        raise ToolkitError(
            f"{title} cannot be downloaded",
            found=str(error).strip()[:200],
            fix="check the network, or copy the data set here and name its folder with --data-dir DIR",
        ) from error
