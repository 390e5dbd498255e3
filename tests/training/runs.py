"""A small training, and what its tests ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.toys import GREY, halves, small_network, wrap
from toolkit.artifacts import TorchModel
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.config import TrainConfig
from toolkit.training import loop
from toolkit.training.loop import TrainingResult, train

PLAN = PgdPlan("pixel", ThreatModel("linf", 0.1, "pixels", clip=True), 20, 0.0125, random_start=True)
TRAIN, VALIDATION, TEST = halves(256, seed=1), halves(64, seed=2), halves(64, seed=3)
CONFIG = TrainConfig(objective="adversarial", epochs=3, batch_size=32, attack_steps=3, precision="float32", ema=0)
STANDARD = CONFIG.model_copy(update={"objective": "standard"})
Weights = dict[str, Tensor]


def run(model: TorchModel, config: TrainConfig, seed: int = 0, **options: Any) -> TrainingResult:
    return train(model, TRAIN, VALIDATION, config, PLAN, seed=seed, **options)


def weights(model: TorchModel) -> Weights:
    return {key: value.clone() for key, value in model.network.state_dict().items()}


def equal(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def robust_share(model: TorchModel) -> float:
    batch = TEST.take(np.arange(len(TEST)))
    surrogate = Surrogate(model.module, GREY)
    attacked = pgd(surrogate, batch.images, batch.labels, PLAN, torch.Generator().manual_seed(0))
    return float(model.predict(attacked).argmax(dim=1).eq(batch.labels).float().mean())


class Cut:
    """Raises KeyboardInterrupt from the progress bar after `steps` steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, amount: int = 1, note: str = "") -> None:
        del note
        self.left -= amount
        if self.left <= 0:
            raise KeyboardInterrupt


def cut_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    @contextmanager
    def task(_label: str, _total: int) -> Iterator[Cut]:
        yield Cut(steps)

    monkeypatch.setattr(loop, "task", task)


def teacher() -> TorchModel:
    torch.manual_seed(7)
    return wrap(small_network(), classes=2, shape=(1, 8, 8))


def other_weights(model: TorchModel) -> TorchModel:
    changed = model.copy()
    with torch.no_grad():
        next(changed.network.parameters()).add_(1e-3)
    return changed
