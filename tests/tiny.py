"""A tiny world for whole runs: separable 16x16 images in an archive, a user's network file, its trained checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolkit import cli
from toolkit.evaluators import timing

NETWORK = '''
"""A user's own network, with its layers in a second file of the same folder."""
from torch import nn
from layers import convolution


def net(num_classes, in_channels):
    body = [*convolution(in_channels, 16), *convolution(16, 32)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(512, num_classes))
'''
LAYERS = """
from torch import nn


def convolution(before, after):
    return nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()
"""
TRAIN, TEST, CLASSES = 600, 150, 3
QUICK = ("--eps", "0.12", "--zero-start", "--steps", "5", "--rounds", "3", "--batch", "1")
"""Short evaluation and benchmark; the archive has no preset, so the radius is needed."""


@dataclass(frozen=True)
class World:
    """A working folder with everything that a run needs, named by relative paths."""

    folder: Path

    @property
    def bundle(self) -> Path:
        return self.folder / "out"


def write_archive(path: Path, *, train: int = TRAIN, test: int = TEST, classes: int = CLASSES, seed: int = 0) -> None:
    """Noise with a brighter stripe where the class says."""
    rng = np.random.default_rng(seed)
    parts: dict[str, np.ndarray[Any, np.dtype[np.generic]]] = {}
    for name, count in (("train", train), ("test", test)):
        labels = np.arange(count) % classes
        images = rng.integers(0, 100, (count, 1, 16, 16), dtype=np.uint8)
        width = 16 // classes
        for image, label in zip(images, labels, strict=True):
            image[:, :, label * width : (label + 1) * width] += 60
        parts |= {f"x_{name}": images, f"y_{name}": labels}
    np.savez_compressed(path, allow_pickle=False, **parts)


@contextlib.contextmanager
def working_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(*arguments: str | Path) -> int:
    """The exit code of one command line, in this process; graphs are timed for a moment only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "BLOCK_S", 0.003)
        return cli.run([str(argument) for argument in arguments])


def harden_arguments(
    output: str | Path = "out",
    *,
    model: str = "model.pt",
    epochs: int = 2,
    attacks: str = "pgd",
    precision: str = "int8",
) -> list[str]:
    """The command of a whole run.

    Args:
        output: the bundle.
        model: what is hardened.
        epochs: of the fine-tuning.
        attacks: beyond the transfer matrix they cost time, so only evidence's own tests ask for more.
        precision: a search by time ends elsewhere from run to run.
    """
    command = ["harden", model, "--prune", "0.5", "--int8", "--epochs", str(epochs), "--attacks", attacks]
    return [*command, "--precision", precision, *QUICK, "--output", str(output)]


def make_world(folder: Path) -> World:
    """Write the data and the network, and train it, by the command line."""
    (folder / "net.py").write_text(NETWORK)
    (folder / "layers.py").write_text(LAYERS)
    write_archive(folder / "data.npz")
    with working_folder(folder):
        training = ["train", "net.py:net", "--data", "npz:data.npz", "--epochs", "3", "--threads", "1", "-q"]
        assert run(*training) == cli.DONE
    return World(folder)


MEASURED = ("timings", "latency", "environment")
"""Parts of a report that hold times and the machine's state."""


def repeatable(report: dict[str, Any]) -> dict[str, Any]:
    """What of a report must be equal from run to run."""
    kept = {key: value for key, value in report.items() if key not in MEASURED}
    quantization = {k: v for k, v in report["quantization"].items() if k not in ("kernel_time", "verdict")}
    return {**kept, "quantization": quantization}


def entries(folder: Path) -> Sequence[str]:
    """Everything in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found
