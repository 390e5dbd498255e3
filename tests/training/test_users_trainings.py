"""`toolkit train` as its users meet it: what is kept when it fails, who else writes, and networks of their own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny
from toolkit import cli
from toolkit.errors import DivergedError, ToolkitError
from toolkit.training.run import Run

NETWORKS = """
import random
import numpy as np
import torch
from torch import nn

class Drawn(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.last = nn.Linear(256, num_classes)
        with torch.no_grad():
            self.last.weight.copy_(torch.from_numpy(0.01 * np.random.randn(num_classes, 256)))
            self.last.bias.fill_(random.random())
    def forward(self, x):
        return self.last(x.flatten(1))

class Masked(Drawn):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

class Pooled(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.Flatten())
        self.last = nn.Linear(8, num_classes)
    def forward(self, x):
        return self.last(self.body(x))
"""
OUTPUT = Path("new.pt")
STATE = Path(".new.pt.partial")


@pytest.fixture
def place(here: Path) -> Path:
    (here / "own.py").write_text(NETWORKS)
    tiny.write_archive(here / "data.npz", train=200, test=30)
    return here


def train(arch: str, *more: str, epochs: int = 2) -> int:
    command = ["train", arch, "--data", "npz:data.npz", "--output", str(OUTPUT), "--threads", "1", "-q"]
    return tiny.run(*command, "--batch-size", "32", "--epochs", str(epochs), *more)


def weights() -> dict[str, Any]:
    found: dict[str, Any] = torch.load(OUTPUT, weights_only=True)["state_dict"]
    return found


def raise_in(step: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Let something happen at one step of the training."""
    original = Run.advance

    def advance(run: Run) -> None:
        if run.step == step:
            act()
        original(run)

    monkeypatch.setattr(Run, "advance", advance)


def failing() -> None:
    raise ToolkitError("images cannot be read", found="a disk that is gone for a moment", fix="mount it again")


def appearing() -> None:
    OUTPUT.write_text("somebody else's")


def diverging() -> None:
    raise DivergedError("the training diverged", found="loss nan", fix="lower --learning-rate")


@pytest.mark.usefixtures("place")
def test_what_was_trained_before_an_error_is_kept_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("own.py:Drawn") == cli.DONE
    whole = weights()
    OUTPUT.unlink()
    with monkeypatch.context() as patch:
        raise_in(7, patch, failing)
        assert train("own.py:Drawn") == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert STATE.is_file() and "with --resume goes on from it" in " ".join(said.split())
    assert train("own.py:Drawn", "--resume") == cli.DONE and not STATE.exists()
    assert all(torch.equal(value, whole[name]) for name, value in weights().items())


@pytest.mark.usefixtures("place")
def test_what_diverged_is_not_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raise_in(7, monkeypatch, diverging)
    assert train("own.py:Drawn") == cli.BAD_INPUT
    assert not STATE.exists() and "--resume" not in capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_a_file_that_appears_during_the_training_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raise_in(1, monkeypatch, appearing)
    assert train("own.py:Drawn") == cli.BAD_INPUT
    assert OUTPUT.read_text() == "somebody else's"
    assert "has appeared" in capsys.readouterr().err and Path("new.finished.pt").is_file() and not STATE.exists()
    OUTPUT.unlink()
    assert tiny.run("prune", "new.finished.pt", "--data", "npz:data.npz", "-o", "pruned.pt", "-q") == cli.BAD_INPUT
    assert "pruning removed nothing" in capsys.readouterr().err, "what was kept is a whole checkpoint"


@pytest.mark.usefixtures("place")
def test_two_trainings_of_one_output_do_not_mix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[int] = []

    def second() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Run, "advance", original)
            found.extend((train("own.py:Drawn"), train("own.py:Drawn", "--resume"), train("own.py:Drawn", "--force")))

    original = Run.advance
    raise_in(7, monkeypatch, second)
    assert train("own.py:Drawn") == cli.DONE
    assert found == [cli.BAD_INPUT] * 3
    assert capsys.readouterr().err.count("another training is writing to this output") == 3
    assert OUTPUT.is_file() and not STATE.exists()


@pytest.mark.usefixtures("place")
def test_the_seed_fixes_what_a_network_draws_from_numpy_and_random() -> None:
    found = []
    for seed in ("5", "5", "6"):
        assert train("own.py:Drawn", "--seed", seed, "--force", "--objective", "none") == cli.DONE
        found.append(weights()["last.weight"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.usefixtures("place")
def test_a_mask_of_infinities_is_no_divergence_and_can_be_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("own.py:Masked") == cli.DONE
    assert bool(weights()["mask"].isinf().any())
    command = ("export", str(OUTPUT), "--data", "npz:data.npz", "-o", "new.onnx", "-q")
    assert tiny.run(*command) == cli.DONE
    broken = torch.load(OUTPUT, weights_only=True)
    broken["state_dict"]["last.bias"][0] = torch.inf
    torch.save(broken, OUTPUT)
    assert tiny.run(*command, "--force") == cli.BAD_INPUT
    assert "the weights contain NaN or infinity" in capsys.readouterr().err


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("flags", [("--batch-size", "1"), ("--batch-size", "4", "--accumulate", "4")])
def test_batch_norm_does_not_learn_from_one_image(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert train("own.py:Pooled", *flags) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "does not learn from one image at a time" in said and "--accumulate" in said
    assert train("own.py:Drawn", *flags, epochs=1) == cli.DONE, "others do"


@pytest.mark.usefixtures("place")
def test_images_in_another_order_make_another_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        raise_in(7, patch, failing)
        assert train("own.py:Drawn") == cli.BAD_INPUT
    with np.load("data.npz") as archive:
        parts = dict(archive)
    shutil.copy("data.npz", "kept.npz")
    order = np.random.default_rng(0).permutation(len(parts["y_train"]))
    np.savez("data.npz", **{name: part[order] if "train" in name else part for name, part in parts.items()})
    assert train("own.py:Drawn", "--resume") == cli.BAD_INPUT
    assert "other settings, data or weights" in " ".join(capsys.readouterr().err.split())
    shutil.copy("kept.npz", "data.npz")
    assert train("own.py:Drawn", "--resume") == cli.DONE


@pytest.mark.usefixtures("place")
def test_a_network_that_learns_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "own.py:Drawn", "--data", "npz:data.npz", "-o", str(OUTPUT), "--threads", "1", "--epochs", "0"]
    assert tiny.run(*command) == cli.DONE
    found = capsys.readouterr()
    assert "random weights" in found.err and "--int8 --eps 8/255" in found.out


@pytest.mark.usefixtures("place")
def test_a_teacher_keeps_its_own_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("own.py:Pooled", epochs=1) == cli.DONE
    OUTPUT.rename("student.pt")
    torch.save(torch.load("student.pt", weights_only=True)["state_dict"], "bare.pt")
    tiny.write_archive(Path("data.npz"), train=200, test=30)
    assert train("cnn8", epochs=1) == cli.DONE
    OUTPUT.rename("teacher.pt")
    command = ["harden", "bare.pt", "--arch", "own.py:Pooled", "--data", "npz:data.npz", "--finetune", "distill"]
    more = ["--teacher", "teacher.pt", "--prune", "0", "--int8", "--epochs", "1", "--eps", "0.1", "--dry-run"]
    assert tiny.run(*command, *more) == cli.DONE, capsys.readouterr().err


@pytest.mark.usefixtures("place")
def test_a_network_that_returns_probabilities_is_refused_before_anything_is_trained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    soft = "class Soft(Drawn):\n    def forward(self, x):\n        return super().forward(x).softmax(1)\n"
    Path("own.py").write_text(f"{NETWORKS}\n{soft}")
    assert train("own.py:Soft") == cli.BAD_INPUT
    assert "returns probabilities" in capsys.readouterr().err and not OUTPUT.exists()
    assert train("own.py:Drawn", "--objective", "none") == cli.DONE
    torch.save(weights(), "bare.pt")
    command = ["harden", "bare.pt", "--arch", "own.py:Soft", "--data", "npz:data.npz", "--eps", "0.1", "--int8"]
    assert tiny.run(*command, "--dry-run") == cli.BAD_INPUT
    assert "leave the softmax" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("place")
def test_the_next_commands_work_for_images_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    """What a command prints as the next one finds its images by what the file says of them."""
    command = ["train", "cnn8", "--data", "npz:data.npz", "-o", "new.pt", "--threads", "1", "--epochs", "1"]
    assert tiny.run(*command) == cli.DONE and "--int8 --eps 8/255" in capsys.readouterr().out
    assert tiny.run("prune", "new.pt", "-p", "0.5", "-o", "small.pt") == cli.DONE
    assert "--prune 0 --int8 --eps 8/255" in capsys.readouterr().out
    assert tiny.run("export", "small.pt", "-o", "small.onnx") == cli.DONE
    assert "toolkit quantize small.onnx" in capsys.readouterr().out
    assert tiny.run("quantize", "small.onnx", "-o", "int8.onnx", "--threads", "1") == cli.DONE
    assert "npz:data.npz in the working folder" in " ".join(capsys.readouterr().err.split())
    attack = ["attack", "small.onnx", "--eps", "0.1", "--attacks", "pgd", "--n", "9", "--threads", "1", "-q"]
    assert tiny.run(*attack) == cli.DONE
