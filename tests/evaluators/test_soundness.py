from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.toys import halves, linear_model
from toolkit.artifacts import Proportion, Split
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.evaluators.robustness import evaluate_robustness
from toolkit.evaluators.soundness import INTEGER_ABOVE_FLOAT, integer_above_float


def shares(fp32: int, deployed: int, total: int = 10_000) -> dict[str, Proportion]:
    return {"fp32": Proportion(fp32, total), "deployed": Proportion(deployed, total)}


@pytest.mark.parametrize(("fp32", "deployed"), [(7000, 7000), (7000, 6000), (7000, 7029), (0, 30)])
def test_no_alarm_up_to_the_limit(fp32: int, deployed: int) -> None:
    assert integer_above_float(shares(fp32, deployed)) == ()


def test_an_alarm_above_the_limit_says_how_much() -> None:
    (alarm,) = integer_above_float(shares(7000, 7250))
    assert alarm.name == "integer_above_float" and alarm.limit == INTEGER_ABOVE_FLOAT == 0.003
    assert alarm.value == pytest.approx(0.025) and "2.50 points" in alarm.message


class Knows:
    """A planted fake: it looks the label up, so no attack on another network changes its answer."""

    def __init__(self, split: Split) -> None:
        self.labels = list(split.labels)
        self.calls = 0

    def predict(self, images: Tensor) -> Tensor:
        self.calls += 1
        return torch.nn.functional.one_hot(torch.tensor(self.labels), 2).float()[: len(images)]


def test_a_planted_graph_that_no_attack_reaches_raises_the_alarm() -> None:
    split = halves(40)
    weight = torch.ones(2, 64).view(2, 8, 8)
    weight[0, :, 4:], weight[1, :, :4] = -1, -1
    model = linear_model(weight.flatten(1), (1, 8, 8))
    plan = PgdPlan("pixel", ThreatModel("linf", 0.6, "pixels", clip=True), 5, 0.2, random_start=False)
    found = evaluate_robustness(model, {"fp32": model, "deployed": Knows(split)}, split, plan, seed=0)
    assert found.worst_case["fp32"].correct == 0 and found.worst_case["deployed"].correct == 40
    (alarm,) = integer_above_float(found.worst_case)
    assert alarm.value == 1.0
    assert found.transfers[1].transfer_rate == Proportion(0, 40)
