"""Data sets by name: `sample`, `fashion-mnist`, `cifar10`, `folder:DIR`, `npz:FILE`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from toolkit import progress
from toolkit.artifacts import ImageSet, ModelSpec, Normalization
from toolkit.config import DataConfig
from toolkit.data.arrays import read_npz
from toolkit.data.images import FolderImages
from toolkit.data.standard import CIFAR10_CLASSES, read_cifar10, read_fashion_mnist
from toolkit.errors import ToolkitError, unknown_name
from toolkit.paths import is_text

SAMPLE = Path(__file__).parent / "sample" / "fashion-mnist-sample.npz"

FASHION_MNIST_HOLDOUT = 5_000


@dataclass(frozen=True)
class DataSource:
    """A data set with its given train and test parts."""

    name: str
    """The user's own words, e.g. `fashion-mnist` or `folder:DIR`."""
    train: ImageSet
    evaluation: ImageSet
    normalization_hint: Normalization
    """For networks trained here; a loaded checkpoint brings its own."""
    holdout: int
    """Number of distinct training images that no training ever sees."""
    threat_key: str | None
    """The data set in whose presets of threat models these images belong; None: `--eps` is required."""


def load_source(config: DataConfig) -> DataSource:
    """Load the data set that `config.source` names.

    Raises:
        ToolkitError: the name is unknown, or the data are missing, unreadable or without a usable form.
    """
    if config.source is None:
        raise ToolkitError(
            "no data set is given", found="no --data, and no data set in the checkpoint", fix=f"add --data: {CHOICES}"
        )
    if not is_text(config.source):
        raise ToolkitError(
            "the data set's name is not UTF-8, so that no report could name it",
            found=ascii(config.source),
            fix="rename the file or folder, or the one that it lies in",
        )
    kind, _, argument = config.source.partition(":")
    if kind not in SOURCES:
        raise _unknown(config.source)
    if bool(argument) != (kind in WITH_ARGUMENT):
        raise ToolkitError(
            "--data is incomplete" if not argument else f"the data set {kind} takes no argument",
            found=f"--data {config.source}",
            fix=f"write it as one of: {CHOICES}",
        )
    source = SOURCES[kind](argument, config)
    if config.size is not None and source.train.shape[1:] != (config.size, config.size):
        _, height, width = source.train.shape
        raise ToolkitError(
            "--size resizes image folders only",
            found=f"--size {config.size} for {config.source}, whose images are {height}x{width}",
            fix="leave --size away, or give the images as --data folder:DIR",
        )
    return source


def check_fits(source: DataSource, spec: ModelSpec) -> None:
    """Check that a model can be fed with, and judged on, the images of `source`.

    Other names for the classes pass with a notice: only the user knows whether they mean the same.

    Raises:
        ToolkitError: class count, class order, channels or image size disagree.
    """
    names, expected = source.train.class_names, spec.class_names
    if len(names) != len(expected):
        raise ToolkitError(
            "the model and the data set disagree in the number of classes",
            found=f"the model has {len(expected)} classes, {source.name} has {len(names)}",
            fix="name the data set that the model was trained on with --data",
        )
    if names != expected and sorted(names) == sorted(expected):
        raise ToolkitError(
            "the model and the data set number the same classes differently",
            found=f"the model: {_some(expected)}; {source.name}: {_some(names)}",
            fix="use the data set as it was when the model was trained; with npz:FILE, set class_names to the model's",
        )
    (channels, *size), (wanted, *wanted_size) = source.train.shape, spec.input_shape
    if channels != wanted:
        raise ToolkitError(
            "the model and the data set disagree in the number of channels",
            found=f"the model takes {_colours(wanted)} images, {source.name} has {_colours(channels)} ones",
            fix="name the data set that the model was trained on with --data, or convert the image files",
        )
    if size != wanted_size:
        square = wanted_size[0] == wanted_size[1]
        hint = f"add --size {wanted_size[0]}, or " if square and source.name.startswith("folder:") else ""
        raise ToolkitError(
            "the model and the data set disagree in the size of images",
            found=f"the model takes {_by(wanted_size)}, {source.name} has {_by(size)}",
            fix=f"{hint}name the data set that the model was trained on with --data",
        )
    if names != expected:
        progress.notice(
            f"warning: the model names its classes {_some(expected)}, and {source.name} {_some(names)}: they are "
            "taken for the same by their numbers, and all figures are wrong if they are not"
        )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _colours(channels: int) -> str:
    return {1: "grey (1 channel)", 3: "RGB (3 channels)"}.get(channels, f"{channels}-channel")


def _by(size: list[int]) -> str:
    return "x".join(map(str, size))


def _unknown(source: str) -> ToolkitError:
    for kind, fits in (("folder", Path(source).is_dir()), ("npz", source.endswith(".npz"))):
        if fits:
            return ToolkitError("unknown data set", found=f"'{source}'", fix=f"write --data {kind}:{source}")
    error = unknown_name("data set", source, SOURCES)
    return ToolkitError(error.problem, found=error.found, fix=f"{error.fix} (as --data: {CHOICES})")


def _source(name: str, train: ImageSet, evaluation: ImageSet, *, threat_key: str | None = None) -> DataSource:
    half = (0.5,) * train.shape[0]
    holdout = max(2, len(train.labels) // 10)
    return DataSource(name, train, evaluation, Normalization(half, half), holdout, threat_key)


def _sample(_argument: str, _config: DataConfig) -> DataSource:
    parts = read_npz(SAMPLE, "sample")
    return _source("sample", parts.train, parts.test, threat_key="fashion-mnist")


def _fashion_mnist(_argument: str, config: DataConfig) -> DataSource:
    train, test = read_fashion_mnist(config.data_dir, download=config.download)
    half = Normalization((0.5,), (0.5,))
    return DataSource("fashion-mnist", train, test, half, FASHION_MNIST_HOLDOUT, "fashion-mnist")


def _cifar10(_argument: str, config: DataConfig) -> DataSource:
    train, test = read_cifar10(config.data_dir, download=config.download)
    return _source("cifar10", train, test, threat_key="cifar10")


def _folder(argument: str, config: DataConfig) -> DataSource:
    root = Path(argument).expanduser()
    if root.exists() and not os.access(root, os.R_OK | os.X_OK):
        raise ToolkitError("the folder may not be opened", found=f"{root}: permission denied", fix="make it readable")
    if not root.is_dir():
        raise ToolkitError("there is no such folder", found=str(root), fix="name an existing folder: --data folder:DIR")
    tests = [root / name for name in ("test", "val") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        inside = ", ".join(sorted(entry.name for entry in root.iterdir())[:5]) or "nothing"
        raise ToolkitError(
            "the image folder has no train and test part",
            found=f"{root} holds: {inside}",
            fix="arrange it as DIR/train/CLASS/IMAGE and DIR/test/CLASS/IMAGE (or DIR/val/CLASS/IMAGE)",
        )
    train = FolderImages(root / "train", size=config.size)
    test = FolderImages(tests[0], class_names=train.class_names, size=config.size, channels=train.shape[0])
    if train.shape != test.shape:
        raise ToolkitError(
            f"the images of train/ and {tests[0].name}/ differ in size",
            found=f"{_by(list(train.shape[1:]))} and {_by(list(test.shape[1:]))}",
            fix="give all images one size with --size N",
        )
    like_cifar = train.class_names == CIFAR10_CLASSES and train.shape == (3, 32, 32)
    return _source(f"folder:{argument}", train, test, threat_key="cifar10" if like_cifar else None)


def _npz(argument: str, _config: DataConfig) -> DataSource:
    parts = read_npz(Path(argument).expanduser(), f"npz:{argument}")
    return _source(f"npz:{argument}", parts.train, parts.test)


SOURCES: Mapping[str, Callable[[str, DataConfig], DataSource]] = {
    "sample": _sample,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "folder": _folder,
    "npz": _npz,
}

WITH_ARGUMENT = ("folder", "npz")

CHOICES = "sample, fashion-mnist, cifar10, folder:DIR, npz:FILE"
