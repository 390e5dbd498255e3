from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.evaluators.defects import threshold_file
from tests.evaluators.greys import Countdown, a_plan, above, conditions, flat_images, threshold
from toolkit.artifacts import Predictor, Proportion, TorchModel
from toolkit.attacks.ensemble import QUERIES, Pass
from toolkit.evaluators.examination import Examination, Saturation, examine
from toolkit.evaluators.robustness import evaluate_robustness
from toolkit.evaluators.scoring import SurrogateName, TargetName
from toolkit.evaluators.surrogate import build_twin, twin_model
from toolkit.exporters.session import OnnxPredictor

pytestmark = pytest.mark.usefixtures("quiet")
SPLIT = flat_images([20, 120, 135, 150, 220])
SURROGATES: dict[SurrogateName, TorchModel] = {"float": threshold()}
HOW = conditions(a_plan(), Pass("apgd-ce", 4), Pass("square", 8))
PROBES = "probes of steps and radii"


def test_the_figures_are_those_of_the_evaluation() -> None:
    targets: dict[TargetName, Predictor] = {"torch": threshold(), "fp32": above(0.45), "deployed": above(0.5)}
    found = examine(SURROGATES, targets, SPLIT, HOW)
    assert found.robustness == evaluate_robustness(SURROGATES, targets, SPLIT, HOW)
    assert found.alarms == tuple(check for check in found.checks if check.alarming)
    assert (found.fidelity, found.saturation, found.not_run) == (None, (), ())


def test_the_twin_is_watched_on_clean_and_attacked_images(tmp_path: Path) -> None:
    """The quantiser ends at 0.8. Attacks move grey 190 (0.745) up to 0.845, because it is labelled dark, and 220
    (0.863) down to 0.763, although it is clipped from the start; 240 (0.941) they cannot move far enough.
    """
    path = threshold_file(tmp_path / "model.onnx", quantised=True)
    twin = build_twin(path)
    split = flat_images([10, 190, 220, 240], labels=[0, 0, 1, 1])
    targets: dict[TargetName, Predictor] = {"deployed": OnnxPredictor(path, threads=1)}
    found = examine({"twin": twin_model(twin)}, targets, split, conditions(), twin=twin)
    assert found.saturation == (Saturation("codes", 0.5, 0.5),)
    assert found.fidelity is not None
    assert found.fidelity.agreement_clean == found.fidelity.agreement_attacked == Proportion(4, 4)


def test_without_a_surrogate_nothing_is_said_of_gradients() -> None:
    """Queries fool what they can; that they beat gradients, of which there are none, is no alarm."""
    how = conditions(a_plan(), Pass("apgd-ce", 4), Pass("square", 100))
    found = examine({}, {"deployed": threshold()}, SPLIT, how)
    assert found.gradients is None
    assert found.not_run == tuple(f"{what}: there is no network to make it on" for what in ("pgd-5", "apgd-ce-4"))
    assert found.robustness.passes[0].fooled > 0 and found.robustness.passes[0].steps == QUERIES
    assert {check.name for check in found.checks} == {"wrong_input", "random_outputs"}
    assert found.alarms == ()


def test_probes_that_nobody_wants_are_neither_made_nor_missed() -> None:
    wanted, unwanted = (
        examine(SURROGATES, {"deployed": above(0.5)}, SPLIT, replace(HOW, probes=probes)) for probes in (True, False)
    )
    assert wanted.gradients is not None
    assert (unwanted.gradients, unwanted.not_run) == (None, ())
    assert unwanted.robustness == wanted.robustness


def budgeted(left: int) -> Examination:
    return examine(SURROGATES, {"deployed": above(0.5)}, SPLIT, HOW, clock=Countdown(left))


@pytest.mark.parametrize("left", range(5))
def test_probes_that_the_time_does_not_suffice_for_are_listed(left: int) -> None:
    """The clock is asked before the matrix, both passes, and the probes."""
    found = budgeted(left)
    expected = [
        "pgd-5 on float",
        "apgd-ce-4 on float: 5 of 5 images" if left == 0 else "apgd-ce-4 on float: 2 of 2 images",
        "square-8 on the graph itself: 5 of 5 images" if left == 0 else "square-8 on the graph itself: 2 of 2 images",
        PROBES,
    ]
    assert list(found.not_run[-1:]) == expected[left:][-1:]
    assert len(found.not_run) == len(expected[left:])
    assert (found.gradients is None) == (PROBES in found.not_run)
    assert found.inputs.accuracy == Proportion(5, 5), "what needs no attack is measured in any case"
