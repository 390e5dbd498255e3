from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.toys import wrap
from tests.training.runs import (
    CONFIG,
    PLAN,
    STANDARD,
    TRAIN,
    VALIDATION,
    equal,
    run,
    weights,
)
from toolkit.artifacts import TorchModel
from toolkit.errors import ToolkitError
from toolkit.training import run as run_module
from toolkit.training.loop import train
from toolkit.training.run import Run


class Views(nn.Module):
    """Flattens with `view`, as most tutorials do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(1, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Linear(96, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x)))
        logits: Tensor = self.last(x.view(x.size(0), -1))
        return logits


class MixesDtypes(Views):
    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.first(x).float() + torch.arange(4, device=x.device).float() / 10))
        logits: Tensor = self.last(x.flatten(1))
        return logits


class OnlyFloat32(Views):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        if x.dtype != torch.float32:
            raise TypeError("float32 is needed")
        logits: Tensor = self.last(x.flatten(1))
        return logits


@pytest.mark.parametrize("objective", ["standard", "adversarial"])
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (Views, "bfloat16 autocast, contiguous"),
        (MixesDtypes, "bfloat16 autocast, channels-last"),
        (OnlyFloat32, "float32, channels-last"),
    ],
)
def test_users_networks_train_in_the_fastest_form_that_they_bear(
    kind: type[Views], form: str, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = wrap(kind(), classes=2, shape=(1, 8, 8))
    before = weights(model)
    result = run(model, CONFIG.model_copy(update={"objective": objective, "precision": "bfloat16"}))
    assert result.precision == form.split()[0].rstrip(",")
    assert result.epochs[-1].accuracy.value > 0.9
    said = capsys.readouterr().err
    assert ("training in " in said) == (form != "bfloat16 autocast, channels-last")
    assert f"training in {form}: " in said or kind is MixesDtypes
    assert ("attacking in " in said) == (objective == "adversarial")
    assert equal(before, weights(model)), "what was tried was a copy"


def test_standard_training_keeps_freed_memory_too(model: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(run_module, "keep_freed_memory", lambda: calls.append(True))
    monkeypatch.setattr(run_module, "compute_device", lambda: torch.device("cpu"))
    train(model, TRAIN, VALIDATION, STANDARD, None, seed=0)
    assert calls


def test_trying_a_network_leaves_no_trace_in_its_statistics(model: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "advance", lambda _self: pytest.fail("nothing is trained here"))
    started = Run(model, TRAIN, VALIDATION, CONFIG, PLAN, 0)
    assert equal(weights(model), {key: value.cpu() for key, value in started.module.network.state_dict().items()})
    assert all(parameter.grad is None for parameter in started.module.parameters())


def test_a_network_that_answers_otherwise_in_training_is_bad_input(model: TorchModel) -> None:
    class Auxiliary(Views):
        def forward(self, x: Tensor) -> Any:
            logits = super().forward(x)
            return (logits, logits) if self.training else logits

    odd = replace(wrap(Auxiliary(), classes=2, shape=(1, 8, 8)), spec=model.spec)
    with pytest.raises(ToolkitError, match="training is not possible with this network") as caught:
        run(odd, STANDARD)
    assert "'tuple'" in caught.value.found and "in training mode too" in caught.value.fix
