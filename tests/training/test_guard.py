from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.toys import wrap
from toolkit.artifacts import Proportion, Split, TorchModel
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.config import TrainConfig
from toolkit.data.images import ArrayImages
from toolkit.training import guard, loop
from toolkit.training.guard import OverfittingGuard
from toolkit.training.loop import train
from toolkit.training.run import Run
from toolkit.training.validation import measure

EPS = 0.1
PLAN = PgdPlan("pixel", ThreatModel("linf", EPS, "pixels", clip=False), 20, EPS / 8, random_start=True)
CONFIG = TrainConfig(
    objective="fgsm", epochs=2, batch_size=8, attack_steps=3, precision="float32", learning_rate=1e-3, ema=0
)


def share(percent: int) -> Proportion:
    return Proportion(percent, 100)


@pytest.mark.parametrize(
    ("best", "done", "fgsm", "pgd", "collapsed"),
    [
        (0.0, 0.1, 40, 5, False),  # an undefended network that came in
        (0.6, 0.1, 70, 55, False),  # small gap
        (0.6, 0.1, 80, 55, False),  # a gap, but no fall
        (0.6, 0.1, 80, 45, True),
        (0.6, 0.9, 80, 61, False),
        (0.6, 0.9, 81, 60, True),
        (0.0, 0.9, 90, 0, True),  # never became robust
        (0.9, 0.9, 40, 35, False),  # a bad phase of both is no collapse
    ],
)
def test_what_is_a_collapse(best: float, done: float, fgsm: int, pgd: int, collapsed: bool) -> None:
    watch = OverfittingGuard({"network": "start"}, best=best)
    found = watch.check(70, done, share(fgsm), share(pgd), {"network": "now"})
    assert found == collapsed
    assert watch.good == {"network": "start" if collapsed else "now"}
    assert watch.best == (best if collapsed else max(best, pgd / 100))
    assert watch.collapse == ({"step": 70, "fgsm": [fgsm, 100], "pgd": [pgd, 100]} if collapsed else None)


def test_the_good_state_is_a_copy() -> None:
    watch, weights = OverfittingGuard(), {"network": {"weight": torch.zeros(2)}}
    watch.check(1, 0.5, share(90), share(90), weights)
    weights["network"]["weight"].add_(1)
    assert torch.equal(watch.good["network"]["weight"], torch.zeros(2))


class Masking(nn.Module):
    """Right and robust with `mask` 0; with 1, wrong only where the top row moved by about half of eps.

    One step from anywhere jumps over that; several smaller steps fall into it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(1, 2)
        self.register_buffer("mask", torch.zeros(1))
        with torch.no_grad():
            self.last.weight.copy_(torch.tensor([[1.0], [-1.0]]))
            self.last.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        moved = (x[:, 0, 0].mean(dim=1) * 0.5) / EPS  # the top row is 0.5 in pixels, 0 normalised
        margin = (3 * torch.cos(2 * math.pi * moved)).clamp_min(-1)
        sign = torch.where(x[:, 0, 1:, :4].mean(dim=(1, 2)) > x[:, 0, 1:, 4:].mean(dim=(1, 2)), 1.0, -1.0)
        mask = self.get_buffer("mask")
        logits: Tensor = self.last((4 * sign * (1 - mask + mask * margin))[:, None])
        return logits


def stripes(count: int, seed: int) -> Split:
    """A grey top row; below it the left half is brighter (class 0) or the right (class 1)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    array = rng.integers(0, 60, (count, 1, 8, 8), dtype=np.uint8)
    for image, label in zip(array, labels, strict=True):
        image[:, :, label * 4 : (label + 1) * 4] += 150
    array[:, :, 0] = 127
    return Split(ArrayImages("stripes", ("left", "right"), array, labels), np.arange(count, dtype=np.int64))


TRAIN, VALIDATION = stripes(80, 1), stripes(64, 2)  # ten steps an epoch


@pytest.fixture
def model() -> TorchModel:
    return wrap(Masking(), classes=2, shape=(1, 8, 8))


def plant(monkeypatch: pytest.MonkeyPatch, step: int) -> list[dict[str, Any]]:
    """Let the network begin to mask in optimiser step `step`; the weights after each step are kept."""
    original = Run.advance
    weights: list[dict[str, Any]] = []

    def advance(run: Run) -> None:
        if run.step + 1 == step:
            run.module.network.get_buffer("mask").fill_(1.0)
        original(run)
        weights.append({name: value.clone() for name, value in run.module.network.state_dict().items()})

    monkeypatch.setattr(Run, "advance", advance)
    return weights


def test_a_planted_collapse_is_undone_and_training_goes_on_by_pgd(
    model: TorchModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = plant(monkeypatch, step=15)
    monkeypatch.setattr(guard, "INTERVAL", 4)
    steps: list[int] = []
    original = Run._batch

    def batch(run: Run, epoch: int, position: int) -> Any:
        steps.append(run.attack.steps)
        return original(run, epoch, position)

    monkeypatch.setattr(Run, "_batch", batch)
    result = train(model, TRAIN, VALIDATION, CONFIG, PLAN, seed=0)
    # checks after steps 4, 8, 12 and 16: the fourth finds it, and goes back to what the third saw
    assert float(weights[14]["mask"]) == 1 and float(weights[15]["mask"]) == 0
    assert all(torch.equal(weights[15][name], value) for name, value in weights[11].items())
    assert steps == [1] * 16 + [3] * 4
    (record,) = result.model.spec.training
    assert record["collapse"]["step"] == 16
    (fgsm, total), (pgd, _) = record["collapse"]["fgsm"], record["collapse"]["pgd"]
    assert total == 64 and fgsm > 0.7 * total and pgd < 0.1 * total
    assert float(result.model.network.get_buffer("mask")) == 0
    err = capsys.readouterr().err
    assert "step 16: single-step training collapsed" in err and "on with PGD-3" in err


@pytest.mark.parametrize("radius", [0.5, 1.5])
def test_the_guard_compares_attacks_of_one_radius(
    radius: float, model: TorchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[Any, ...]] = []

    def measured(module: Any, split: Split, adversary: Any, attacks: tuple[Any, ...], seed: int) -> Any:
        if len(attacks) == 2:
            compared.append(attacks)
        return measure(module, split, adversary, attacks, seed)

    monkeypatch.setattr(guard, "INTERVAL", 4)
    monkeypatch.setattr("toolkit.training.run.measure", measured)
    train(model, TRAIN, VALIDATION, CONFIG.model_copy(update={"radius": radius}), PLAN, seed=0)
    assert compared and {attack.threat.eps for pair in compared for attack in pair} == {radius * EPS}


def test_without_a_collapse_single_steps_go_on(model: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "INTERVAL", 4)
    result = train(model, TRAIN, VALIDATION, CONFIG, PLAN, seed=0)
    assert result.model.spec.training[-1]["collapse"] is None
    assert result.epochs[-1].robust is not None and result.epochs[-1].robust.value == 1


@pytest.mark.parametrize("cut", [14, 16, 18])
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_run_that_collapsed_resumes_to_the_same_weights(
    model: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int, ema: float
) -> None:
    monkeypatch.setattr(guard, "INTERVAL", 4)
    config = CONFIG.model_copy(update={"ema": ema})
    with monkeypatch.context() as patched:
        plant(patched, step=15)
        whole = train(model, TRAIN, VALIDATION, config, PLAN, seed=0)
        monkeypatch.setattr(loop, "SAVE_EVERY_S", -1.0)
        planted = Run.advance

        def advance(run: Run) -> None:
            planted(run)
            if run.step == cut + 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as cutting:
            cutting.setattr(Run, "advance", advance)
            with pytest.raises(KeyboardInterrupt):
                train(model, TRAIN, VALIDATION, config, PLAN, seed=0, checkpoint=tmp_path / "a.pt")
        assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == cut
        resumed = train(model, TRAIN, VALIDATION, config, PLAN, seed=0, checkpoint=tmp_path / "a.pt", resume=True)
    ours, theirs = (found.model.network.state_dict() for found in (whole, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole.epochs == resumed.epochs
    assert whole.model.spec.training[-1]["collapse"] == resumed.model.spec.training[-1]["collapse"]
