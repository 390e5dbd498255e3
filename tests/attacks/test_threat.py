from __future__ import annotations

from typing import Any

import pytest
import torch

from toolkit.artifacts import Normalization
from toolkit.attacks.threat import PRESETS, PgdPlan, ThreatModel, resolve_plan
from toolkit.config import ThreatConfig, build
from toolkit.errors import ToolkitError

HALF = Normalization((0.5,), (0.5,))
UNEVEN = Normalization((0.5, 0.5, 0.5), (0.5, 0.25, 0.125))


def plan(data_key: str | None = "fashion-mnist", **choices: Any) -> PgdPlan:
    return resolve_plan(build(ThreatConfig, choices), data_key)


def test_the_pixel_preset_is_the_fields() -> None:
    grey, colour = plan(), plan("cifar10")
    assert grey.threat == ThreatModel("linf", 0.1, "pixels", clip=True)
    assert colour.threat == ThreatModel("linf", 8 / 255, "pixels", clip=True)
    assert grey.steps == colour.steps == 20 and grey.random_start and colour.random_start
    assert grey.step_size == pytest.approx(2.5 * 0.1 / 20)


def test_the_paper_preset_is_the_papers() -> None:
    for data_key, eps in (("fashion-mnist", 0.1), ("cifar10", 8 / 255)):
        found = plan(data_key, preset="paper")
        assert found.threat == ThreatModel("linf", eps, "normalised", clip=False)
        assert (found.steps, found.step_size, found.random_start, found.restarts) == (20, 0.01, False, 1)


def test_fractions_are_understood() -> None:
    assert plan(eps="8/255").threat.eps == 8 / 255
    assert plan(eps="0.25").threat.eps == 0.25
    assert plan(eps=0.5, step_size="1/4").step_size == 0.25


@pytest.mark.parametrize("eps", ["eight", "8/0", "8/255/2", "/255", "-8/255", -0.1, 0, "nan", "inf", "1/nan"])
def test_eps_that_is_no_positive_number_is_refused(eps: object) -> None:
    with pytest.raises(ToolkitError, match="no usable value") as caught:
        plan(eps=eps)
    assert "eps" in caught.value.found and repr(eps).strip("'").split("/")[0] in caught.value.found


def test_other_data_sets_must_state_eps() -> None:
    with pytest.raises(ToolkitError, match="--threat pixel has no linf preset") as caught:
        plan(None)
    assert "--eps" in caught.value.fix
    with pytest.raises(ToolkitError, match="--threat paper has no l2 preset"):
        plan(preset="paper", norm="l2")
    assert plan(None, eps=0.05).threat == ThreatModel("linf", 0.05, "pixels", clip=True)
    assert plan(None, eps=0.5, norm="l2").threat == ThreatModel("l2", 0.5, "pixels", clip=True)
    assert plan(None, eps=12, norm="l1").threat == ThreatModel("l1", 12, "pixels", clip=True)
    assert plan(None, eps=0.5, preset="paper").threat == ThreatModel("linf", 0.5, "normalised", clip=False)


def test_choices_stand_in_the_place_of_the_presets() -> None:
    found = plan(eps=0.2, steps=40, step_size=0.01, random_start=False)
    assert (found.threat.eps, found.steps, found.step_size, found.random_start) == (0.2, 40, 0.01, False)
    assert found.threat.space == "pixels" and found.preset == "pixel"


def test_the_step_follows_eps_and_steps() -> None:
    assert plan(eps=0.2).step_size == pytest.approx(2.5 * 0.2 / 20)
    assert plan(steps=10).step_size == pytest.approx(2.5 * 0.1 / 10)


def test_the_papers_step_is_kept_while_its_steps_can_cross_the_ball() -> None:
    assert plan(preset="paper", eps=0.2).step_size == 0.01
    assert plan(preset="paper", steps=5).step_size == pytest.approx(2.5 * 0.1 / 5)
    assert plan(preset="paper", eps=0.4).step_size == pytest.approx(2.5 * 0.4 / 20)


def test_restarts_start_at_random() -> None:
    found = plan(preset="paper", restarts=3)
    assert found.random_start and found.restarts == 3


def test_margin_is_how_far_attacked_pixels_may_leave_the_range() -> None:
    paper = PRESETS["paper", "fashion-mnist"].threat
    assert paper.margin(HALF) == pytest.approx(0.05)
    assert paper.margin(UNEVEN) == pytest.approx(0.05)
    assert PRESETS["pixel", "fashion-mnist"].threat.margin(HALF) == 0


def test_pixel_scale_is_per_channel() -> None:
    scale = PRESETS["paper", "cifar10"].threat.pixel_scale(UNEVEN)
    assert torch.equal(scale, torch.tensor([0.5, 0.25, 0.125]).view(1, 3, 1, 1))
    assert torch.equal(PRESETS["pixel", "cifar10"].threat.pixel_scale(UNEVEN), torch.ones(1, 3, 1, 1))


def test_the_record_names_the_threat_model() -> None:
    assert plan(preset="paper").record() == {
        "preset": "paper",
        "norm": "linf",
        "eps": 0.1,
        "space": "normalised",
        "clip": False,
    }


def test_restarts_that_would_all_be_the_same_are_refused() -> None:
    with pytest.raises(ToolkitError, match="all the same attack") as caught:
        plan(random_start=False, restarts=3)
    assert "--zero-start" in caught.value.found and "--restarts 3" in caught.value.found
    assert "--zero-start" in caught.value.fix
    assert plan(random_start=False).restarts == 1
    assert plan(random_start=True, restarts=3).random_start
