"""`toolkit train` on networks that do not fit: tried before training, and bad input rather than a defect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from toolkit import cli

NETWORKS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, 4, 1), nn.Linear(1024, num_classes)
    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.last(x.view(x.size(0), -1))

class Dictionary(Net):
    def forward(self, x):
        return {"logits": super().forward(x)}

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x
"""


@pytest.fixture
def colour(here: Path) -> Path:
    """Colour images of 64x64 in an archive, and networks in a file."""
    rng = np.random.default_rng(0)
    parts: dict[str, np.ndarray[Any, np.dtype[np.generic]]] = {}
    for name, count in (("train", 80), ("test", 20)):
        labels = np.arange(count) % 2
        images = rng.integers(0, 100, (count, 3, 64, 64), dtype=np.uint8)
        images[labels == 1, :, :32] += 100
        parts |= {f"x_{name}": images, f"y_{name}": labels}
    np.savez_compressed(here / "colour.npz", allow_pickle=False, **parts)
    (here / "colour.py").write_text(NETWORKS)
    return here


def train(arch: str, *more: str) -> int:
    command = ["train", arch, "--data", "npz:colour.npz", "--output", "new.pt", "--epochs", "1", "--threads", "1"]
    return tiny.run(*command, *more)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("colour.py:Dictionary", ["forward() returns a dict", "return the logits alone"]),
        ("colour.py:Pair", ["forward() returns a tuple", "return the logits alone"]),
        ("torchvision:inception_v3", ["does not take the data set's images", "[3, 64, 64]"]),
        ("torchvision:maxvit_t", ["multiple of 224", "64x64"]),
    ],
)
def test_a_network_that_does_not_fit_is_bad_input(
    arch: str, words: list[str], colour: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(arch, "-q") == cli.BAD_INPUT
    said = "".join(line.strip("│ ").replace(" ", "") for line in capsys.readouterr().err.splitlines())
    assert all(word.replace(" ", "") in said for word in words), said
    assert not (colour / "new.pt").exists()


def test_a_network_that_flattens_with_view_is_trained(colour: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("colour.py:Net") == cli.DONE
    assert "training in " in capsys.readouterr().err and (colour / "new.pt").is_file()


@pytest.mark.usefixtures("colour")
def test_adversarial_training_of_data_without_a_preset_needs_a_radius(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("colour.py:Net", "--objective", "adversarial", "-q") == cli.BAD_INPUT
    assert "--eps" in capsys.readouterr().err
    assert train("colour.py:Net", "--objective", "adversarial", "--eps", "8/255", "-q") == cli.DONE
    (record,) = torch.load("new.pt", weights_only=True)["spec"]["training"]
    assert record["threat"]["eps"] == 8 / 255
