from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.toys import halves
from tests.training.runs import (
    CONFIG,
    PLAN,
    STANDARD,
    TRAIN,
    VALIDATION,
    cut_after,
    equal,
    other_weights,
    run,
    teacher,
    weights,
)
from toolkit.artifacts import Split, TorchModel
from toolkit.data.images import ArrayImages
from toolkit.errors import ToolkitError
from toolkit.training import loop
from toolkit.training.loop import train
from toolkit.training.run import Run

EVERY: dict[str, dict[str, Any]] = {
    "adversarial": {"augment": True},
    "adversarial, bfloat16": {"augment": True, "precision": "bfloat16"},
    "averaged": {"ema": 0.9},
    "fgsm": {"objective": "fgsm", "ema": 0.5},
    "trades": {"objective": "trades", "beta": 2.0},
    "distill": {"objective": "distill", "clean_share": 0.5, "temperature": 2.0},
    "distill, augmented": {"objective": "distill", "augment": True},
}
"""Settings that resume, each over `CONFIG`."""


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("steps", [3, 8, 13])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    model: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, name: str
) -> None:
    config = CONFIG.model_copy(update={"epochs": 2, **EVERY[name]})
    whole = run(model, config, checkpoint=tmp_path / "whole.pt", teacher=teacher())
    with monkeypatch.context() as patched:
        patched.setattr(loop, "SAVE_EVERY_S", -1.0)
        cut_after(patched, steps)
        with pytest.raises(KeyboardInterrupt):
            run(model, config, checkpoint=tmp_path / "cut.pt", teacher=teacher())
    saved = torch.load(tmp_path / "cut.pt", weights_only=True)
    assert saved["step"] == steps
    torch.rand(5)  # the state of the global generator must not matter
    resumed = run(model, config, checkpoint=tmp_path / "cut.pt", resume=True, teacher=teacher())
    assert equal(weights(whole.model), weights(resumed.model))
    assert whole.epochs == resumed.epochs and whole.best_epoch == resumed.best_epoch


def test_a_distillation_resumes_with_its_own_teacher_wherever_its_file_lies(model: TorchModel, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"objective": "distill", "epochs": 1, "teacher": Path("here.pt")})
    run(model, config, checkpoint=tmp_path / "a.pt", teacher=teacher())
    moved = config.model_copy(update={"teacher": Path("there.pt")})
    run(model, moved, checkpoint=tmp_path / "a.pt", resume=True, teacher=teacher())
    with pytest.raises(ToolkitError, match="other settings, data or weights"):
        run(model, config, checkpoint=tmp_path / "a.pt", resume=True, teacher=model)


def test_a_finished_run_is_resumed_without_another_step(
    model: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(model, STANDARD, checkpoint=tmp_path / "a.pt")
    monkeypatch.setattr(Run, "advance", lambda _self: pytest.fail("no step is left"))
    again = run(model, STANDARD, checkpoint=tmp_path / "a.pt", resume=True)
    assert equal(weights(first.model), weights(again.model))


def test_without_resume_an_old_checkpoint_is_not_read(model: TorchModel, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"rubbish")
    run(model, STANDARD, checkpoint=tmp_path / "a.pt")


def relabelled(split: Split) -> Split:
    """With the labels the other way round."""
    images = split.images
    array = images.pixels(np.arange(len(images.labels)))
    return replace(split, images=ArrayImages("relabelled", images.class_names, array, 1 - images.labels))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: train(model, TRAIN, VALIDATION, STANDARD, PLAN, seed=1, checkpoint=Path("a.pt"), resume=True),
        lambda model: train(
            model, halves(256, seed=9), VALIDATION, STANDARD, PLAN, seed=0, checkpoint=Path("a.pt"), resume=True
        ),
        lambda model: train(
            model, TRAIN, halves(64, seed=9), STANDARD, PLAN, seed=0, checkpoint=Path("a.pt"), resume=True
        ),
        lambda model: train(
            model, relabelled(TRAIN), VALIDATION, STANDARD, PLAN, seed=0, checkpoint=Path("a.pt"), resume=True
        ),
        lambda model: run(model, CONFIG, checkpoint=Path("a.pt"), resume=True),
        lambda model: run(other_weights(model), STANDARD, checkpoint=Path("a.pt"), resume=True),
    ],
)
def test_another_run_cannot_be_resumed(
    model: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[TorchModel], object]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(model, STANDARD, checkpoint=Path("a.pt"))
    with pytest.raises(ToolkitError, match="other settings, data or weights") as caught:
        change(model)
    assert "--resume" in caught.value.fix


def test_another_start_of_the_attack_is_another_run(model: TorchModel, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"epochs": 1, "attack_schedule": "threat"})
    from_zero = replace(PLAN, random_start=False)
    found = run(model, config, checkpoint=tmp_path / "a.pt")
    assert found.model.spec.training[-1]["attack"] == {"steps": 3, "step_size": 0.0125, "start": "uniform"}
    with pytest.raises(ToolkitError, match="other settings, data or weights"):
        train(model, TRAIN, VALIDATION, config, from_zero, seed=0, checkpoint=tmp_path / "a.pt", resume=True)


@pytest.mark.parametrize("content", [b"", b"rubbish", None])
def test_a_damaged_checkpoint_cannot_be_resumed(model: TorchModel, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.pt"
    if content is None:
        torch.save({"step": 3}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ToolkitError, match="training checkpoint is damaged") as caught:
        run(model, STANDARD, checkpoint=path, resume=True)
    assert str(path) in caught.value.found and "without --resume" in caught.value.fix


@pytest.mark.parametrize("content", ["damaged", "of another run"])
def test_a_checkpoint_that_does_not_fit_is_given_up_where_that_is_asked_for(
    model: TorchModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "a.pt"
    if content == "damaged":
        path.write_bytes(b"rubbish")
    else:
        run(other_weights(model), STANDARD, checkpoint=path)
    found = run(model, STANDARD, checkpoint=path, resume="or anew")
    assert "it begins anew" in capsys.readouterr().err
    assert equal(weights(found.model), weights(run(model, STANDARD).model))
    run(model, STANDARD, checkpoint=path, resume=True)


def test_other_arithmetic_is_warned_of(model: TorchModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = STANDARD.model_copy(update={"precision": "float32"})
    run(model, config, checkpoint=tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    for begun, said in (("bfloat16 on cuda", True), (state["arithmetic"], False)):
        torch.save({**state, "arithmetic": begun}, tmp_path / "a.pt")
        run(model, config, checkpoint=tmp_path / "a.pt", resume=True)
        assert ("began in bfloat16 on cuda and goes on in float32" in capsys.readouterr().err) is said


def test_another_number_of_threads_is_warned_of(
    model: TorchModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(model, STANDARD, checkpoint=tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**state, "threads": 77}, tmp_path / "a.pt")
    run(model, STANDARD, checkpoint=tmp_path / "a.pt", resume=True)
    assert "began with 77 thread(s)" in capsys.readouterr().err


def test_ctrl_c_loses_no_step(model: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(model, STANDARD, checkpoint=tmp_path / "whole.pt")
    original = Run.advance

    def advance(self: Run) -> None:
        original(self)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            run(model, STANDARD, checkpoint=tmp_path / "cut.pt")
    assert torch.load(tmp_path / "cut.pt", weights_only=True)["step"] == 2
    resumed = run(model, STANDARD, checkpoint=tmp_path / "cut.pt", resume=True)
    assert equal(weights(whole.model), weights(resumed.model))


class Counter:
    """An observer that counts training passes of the first layer."""

    def __init__(self) -> None:
        self.passes = 0

    def attach(self, network: nn.Module) -> None:
        def count(module: nn.Module, *_: object) -> None:
            self.passes += module.training

        next(module for module in network.modules() if isinstance(module, nn.Conv2d)).register_forward_hook(count)

    def state(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def restore(self, state: dict[str, Any]) -> None:
        self.passes = state["passes"]


def test_an_observer_sees_every_batch_once_however_often_the_training_is_cut(
    model: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, before, after = Counter(), Counter(), Counter()
    result = run(model, CONFIG, observer=whole)
    assert whole.passes == 3 * 256 // 32, "neither attacks nor validation count"
    with monkeypatch.context() as patched:
        cut_after(patched, 10)
        with pytest.raises(KeyboardInterrupt):
            run(model, CONFIG, checkpoint=tmp_path / "state", observer=before)
    again = run(model, CONFIG, checkpoint=tmp_path / "state", resume=True, observer=after)
    assert after.passes == whole.passes and equal(weights(result.model), weights(again.model))
