"""Every alarm: a planted defect sets it off through the whole examination, and a sound network does not."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from PIL import Image
from torch import Tensor, nn

from tests.evaluators.defects import InTraining, Knows, OfMean, in_one_pixel, misled, of_mean, threshold_file
from tests.evaluators.greys import Norm, a_plan, above, conditions, flat_images, threshold
from tests.exporters.small import onnx_file
from toolkit.artifacts import Predictor, Proportion, Split, TorchModel
from toolkit.attacks.ensemble import Pass
from toolkit.evaluators.evaluation import Conditions
from toolkit.evaluators.examination import Examination, examine
from toolkit.evaluators.fidelity import FIDELITY_LIMIT, Fidelity
from toolkit.evaluators.probes import GradientProbes, Point
from toolkit.evaluators.scoring import SurrogateName, TargetName
from toolkit.evaluators.soundness import (
    LIMITS,
    Check,
    alarms,
    disagreement_under_attack,
    end_to_end_differs,
    gradient_checks,
    integer_above_float,
    query_beats_gradient,
    unfaithful_surrogate,
)
from toolkit.evaluators.surrogate import build_twin, twin_model
from toolkit.evaluators.transfer import ColumnTest
from toolkit.evaluators.worst_case import PassRecord
from toolkit.exporters.end_to_end import EndToEndComparison, compare_end_to_end, export_end_to_end
from toolkit.exporters.session import OnnxPredictor
from toolkit.statistics import Mcnemar

pytestmark = pytest.mark.usefixtures("quiet")
GREYS = flat_images([*range(5, 110, 8), *range(145, 250, 8)])
"""14 dark and 14 bright images."""
PASSES = (Pass("apgd-ce", 10), Pass("square", 60))


def examined(
    model: TorchModel,
    split: Split = GREYS,
    how: Conditions | None = None,
    *,
    targets: Mapping[TargetName, Predictor] | None = None,
) -> Examination:
    how = how or conditions(a_plan(10, step_size=0.025))
    return examine({"float": model}, targets or {"torch": model}, split, how)


def alarm(found: Examination, name: str) -> Check:
    """The alarm of that name, whose message stands by its limit."""
    (check,) = [check for check in found.alarms if check.name == name]
    assert LIMITS[name] <= check.limit < check.value and check.message
    return check


def test_a_sound_network_raises_no_alarm_and_every_check_is_made(tmp_path: Path) -> None:
    """An integer graph, its float twin and its straight-through twin; of all limits but that of the end-to-end file."""
    path = threshold_file(tmp_path / "model.onnx", quantised=True)
    twin, model = build_twin(path), threshold()
    surrogates: dict[SurrogateName, TorchModel] = {"float": model, "twin": twin_model(twin)}
    deployed = OnnxPredictor(path, threads=1)
    targets: dict[TargetName, Predictor] = {"torch": model, "fp32": model, "deployed": deployed}
    how = conditions(a_plan(10, step_size=0.025), *PASSES)
    found = examine(surrogates, targets, GREYS, how, twin=twin)
    assert found.alarms == () and found.not_run == ()
    assert {check.name for check in found.checks} == set(LIMITS) - {"end_to_end_differs"}
    assert found.fidelity is not None and found.fidelity.valid
    assert 0 < found.robustness.worst_case["deployed"].correct < len(GREYS)


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.4), ("l1", 1.6), ("l2", 0.004), ("l1", 0.02)])
@pytest.mark.parametrize("random_start", [True, False])
def test_a_sound_network_raises_no_alarm_in_any_norm(norm: Norm, eps: float, random_start: bool) -> None:
    """Small radii too: the largest one probed lets the attack do anything, whatever the one that is reported."""
    how = conditions(a_plan(10, norm=norm, eps=eps, step_size=eps / 4, random_start=random_start), *PASSES)
    assert examined(threshold(), how=how).alarms == ()


def test_a_network_on_which_longer_attacks_get_stuck() -> None:
    """The margin has a shallow valley near the image and a deep one at the edge: one long step leaps over the first."""

    def valleys(mean: Tensor) -> Tensor:
        u = (mean - 128 / 255) / 0.1
        return 1.2 + torch.sin(3 * math.pi * u) - 1.5 * u**2

    found = examined(of_mean(valleys), flat_images([128] * 6))
    check = alarm(found, "more_steps_weaker")
    assert check.value == 1.0
    assert "5 steps at a radius of 0.1 leave more images right than 1 steps" in check.message


def test_a_network_that_is_periodic_along_the_perturbation() -> None:
    """One step of the whole radius: of once the radius it fools, of twice it comes round to the image's own side."""
    model = of_mean(lambda mean: torch.cos(math.pi * (mean - 128 / 255) / 0.1 + 0.1))
    found = examined(model, flat_images([128] * 6), conditions(a_plan(1)))
    check = alarm(found, "larger_radius_weaker")
    assert check.value == 1.0 and "at a radius of 0.15" in check.message


def test_masked_gradients_survive_the_largest_radius() -> None:
    found = examined(misled(in_one_pixel))
    assert alarm(found, "large_radius_survived").value == pytest.approx(0.5)
    assert not {"zero_gradients", "loss_not_rising"} & {check.name for check in found.alarms}


@pytest.mark.parametrize("change", [in_one_pixel, lambda gradient: -gradient, torch.zeros_like])
def test_a_search_by_queries_that_beats_the_gradients(change: Callable[[Tensor], Tensor]) -> None:
    """The distance to the boundary is half the radius, but only the search gets there."""
    split = flat_images([115] * 10 + [140] * 10)
    found = examined(misled(change), split, conditions(a_plan(10, step_size=0.025), *PASSES))
    assert [record.fooled for record in found.robustness.passes] == [0, 20]
    assert alarm(found, "query_beats_gradient").value == 1.0


def test_a_network_without_gradients() -> None:
    found = examined(misled(torch.zeros_like))
    assert alarm(found, "zero_gradients").value == 1.0


def test_gradients_that_point_the_wrong_way() -> None:
    found = examined(misled(lambda gradient: -gradient))
    assert alarm(found, "loss_not_rising").value == 1.0


def test_dropout_that_was_left_on() -> None:
    torch.manual_seed(0)
    split = flat_images([120] * 16 + [135] * 16)
    network = nn.Sequential(nn.Dropout(0.5), OfMean(lambda mean: mean - 0.5))
    found = examined(threshold(), split, targets={"deployed": InTraining(network)})
    assert alarm(found, "random_outputs").value > 0.1


def test_batch_norm_that_was_left_in_training_mode() -> None:
    """It answers by the mean of the images around: the dark half alone is no longer all dark."""
    network = nn.Sequential(nn.BatchNorm2d(1), OfMean(lambda mean: mean))
    found = examined(threshold(), targets={"deployed": InTraining(network)})
    assert found.inputs.accuracy.value == 1.0, "in the company of the whole batch it is right"
    assert alarm(found, "random_outputs").value == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("form", "network", "values"),
    [
        ("pixels in [0, 255]", threshold(127.5), [*range(0, 256, 15)]),
        ("pixels in [-1, 1]", threshold(0.0), [*range(0, 256, 15)]),
        ("pixels standardised by channel", threshold(0.0), [*range(10, 40, 3), *range(60, 90, 3)]),
        ("negative images", threshold(slope=-1.0), [*range(0, 256, 15)]),
    ],
)
def test_a_network_that_wants_other_pixels(form: str, network: TorchModel, values: Sequence[int]) -> None:
    labels = [value > sorted(values)[len(values) // 2 - 1] for value in values]
    found = examined(network, flat_images(values, [int(label) for label in labels]))
    check = alarm(found, "wrong_input")
    assert check.value > 0.4 and f"classifies {form} better" in check.message and "--mean, --std" in check.message


def test_float_and_integer_graph_that_part_under_attack() -> None:
    """Both are right when clean; between 0.4 and 0.5, where the attack ends, they are not of one mind."""
    split = flat_images([140] * 6 + [10] * 6 + [250] * 8)
    targets: dict[TargetName, Predictor] = {"fp32": threshold(), "deployed": above(0.4)}
    check = alarm(examined(threshold(), split, targets=targets), "disagreement_under_attack")
    assert check.value == pytest.approx(6 / 20) and "clean on 0.00%" in check.message


def test_a_twin_that_is_not_faithful(tmp_path: Path) -> None:
    """The file says bright above 0.5, the session that is deployed above 0.6."""
    twin = build_twin(threshold_file(tmp_path / "model.onnx"))
    split = flat_images([10, 20, 30, 40, 200, 210, 220, 230, 240, 145])
    targets: dict[TargetName, Predictor] = {"deployed": above(0.6)}
    found = examine({"twin": twin_model(twin)}, targets, split, conditions(a_plan(10, step_size=0.025)), twin=twin)
    assert found.fidelity is not None and found.fidelity.agreement_clean == Proportion(9, 10)
    check = alarm(found, "surrogate_unfaithful")
    assert check.value == pytest.approx(0.1) and "invalid" in check.message and not found.fidelity.valid


def test_an_integer_graph_that_no_attack_reaches() -> None:
    split = flat_images([115] * 20 + [140] * 20)
    targets: dict[TargetName, Predictor] = {"fp32": threshold(), "deployed": Knows(split)}
    found = examined(threshold(), split, conditions(a_plan(5), Pass("apgd-ce", 5)), targets=targets)
    assert found.robustness.worst_case == {"fp32": Proportion(0, 40), "deployed": Proportion(40, 40)}
    check = alarm(found, "integer_above_float")
    assert check.value == 1.0 and "100.00 points" in check.message
    assert found.robustness.transfers[1].transfer_rate == Proportion(0, 40)


def linear_file(path: Path, gain: float) -> Path:
    """Logits are the first two pixels times `gain`."""
    weight = np.zeros((2, 3 * 8 * 8), np.float32)
    weight[0, 0] = weight[1, 1] = gain
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"], transB=1),
    ]
    path = onnx_file(path, nodes, ["N", 3, 8, 8], weight=weight)
    model = onnx.load(path)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", 2]))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("defect", [False, True])
def test_preprocessing_in_the_graph_that_is_not_that_of_the_figures(tmp_path: Path, defect: bool) -> None:
    """The reference is a network that was given pixels in [-1, 1], the graph gives its own those in [0, 1]."""
    network = linear_file(tmp_path / "model.onnx", 4.0)
    path = export_end_to_end(network, tmp_path / "e2e.onnx", input_shape=(3, 8, 8), class_names=["a", "b"])
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0, 0], pixels[0, 1] = 240, 140
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    (tmp_path / "image.png").write_bytes(buffer.getvalue())

    class Reference:
        def predict(self, images: Tensor) -> Tensor:
            return OnnxPredictor(network, threads=1).predict(images * 2 - 1 if defect else images)

    compared = compare_end_to_end(path, [tmp_path / "image.png"], Reference())
    found = alarms(end_to_end_differs(compared))
    assert [check.name for check in found] == (["end_to_end_differs"] if defect else [])
    if defect:
        first, second = (1 / (1 + math.exp(-gain * 100 / 255)) for gain in (4.0, 8.0))
        assert found[0].value == pytest.approx(second - first, abs=1e-3)
        assert "model.e2e.onnx" in found[0].message


def shares(fp32: int, deployed: int, total: int = 10_000) -> dict[str, Proportion]:
    return {"fp32": Proportion(fp32, total), "deployed": Proportion(deployed, total)}


@pytest.mark.parametrize(("fp32", "deployed"), [(7000, 7000), (7000, 6000), (7000, 7029), (0, 30)])
def test_integer_graphs_up_to_the_limit_above_float_are_no_alarm(fp32: int, deployed: int) -> None:
    assert alarms(integer_above_float(shares(fp32, deployed))) == ()


def test_an_integer_graph_above_the_limit_is_told_with_its_gain() -> None:
    (check,) = alarms(integer_above_float(shares(7000, 7250)))
    assert check.value == pytest.approx(0.025) and check.limit == 0.003 and "2.50 points" in check.message


def fidelity(clean: tuple[int, int], attacked: tuple[int, int] | None) -> Fidelity:
    return Fidelity(Proportion(*clean), Proportion(*attacked) if attacked else None, 0.1, 0.1)


@pytest.mark.parametrize("right", [98, 99, 100])
def test_the_alarm_of_the_twin_and_its_validity_have_one_limit(right: int) -> None:
    """At the limit itself too, where 1 - 0.99 is above 0.01 in floating point."""
    for found in (fidelity((right, 100), (100, 100)), fidelity((100, 100), (right, 100)), fidelity((right, 100), None)):
        assert bool(alarms(unfaithful_surrogate("twin", found))) == (not found.valid) == (right / 100 < FIDELITY_LIMIT)


def test_what_cannot_be_checked_is_not_checked() -> None:
    assert integer_above_float({"deployed": Proportion(1, 2)}) == ()
    assert end_to_end_differs(None) == ()
    gradient = PassRecord("apgd-ce", 100, (), "float", ("deployed",), 50, 9)
    assert query_beats_gradient([gradient], 100) == ()
    column = ColumnTest("pgd-20", "float", "torch", "fp32", Mcnemar(50, 0, 0.0))
    assert disagreement_under_attack([column], Mcnemar(0, 0, 1.0), 100) == ()
    wanted = ColumnTest("pgd-20", "float", "fp32", "deployed", Mcnemar(50, 0, 0.0))
    assert disagreement_under_attack([wanted], None, 100) == ()


def test_queries_count_what_they_add_of_all_images() -> None:
    passes = [
        PassRecord("apgd-ce", 100, (), "float", ("deployed",), 500, 90),
        PassRecord("square", 500, (), None, ("deployed",), 400, 4),
        PassRecord("square", 5000, (), None, ("deployed",), 100, 2),
    ]
    (check,) = query_beats_gradient(passes, 1000)
    assert check.value == pytest.approx(0.006) and check.alarming
    (check,) = query_beats_gradient(passes[:2], 1000)
    assert not check.alarming
    onward = PassRecord("square", 1500, (), None, ("deployed",), 100, 50, onward=True)
    assert query_beats_gradient([passes[0], onward], 1000) == (), "it owes the gradients most of the way"
    assert query_beats_gradient([*passes, onward], 1000)[0].value == pytest.approx(0.006)
    other = PassRecord("square", 500, (), None, ("fp32",), 400, 5)
    (check,) = query_beats_gradient([*passes[:2], other], 1000)
    assert check.value == pytest.approx(0.005) and "float twin" in check.message, "graph by graph, the worse one"


def test_the_surrogate_on_which_graphs_part_most_is_named() -> None:
    apart: dict[SurrogateName, int] = {"float": 10, "twin": 30, "original": 5}
    columns = [ColumnTest("pgd-20", name, "fp32", "deployed", Mcnemar(n, n, 1.0)) for name, n in apart.items()]
    (check,) = disagreement_under_attack(columns, Mcnemar(10, 20, 0.1), 1000)
    assert check.value == pytest.approx(0.03) and "on twin" in check.message and "clean on 3.00%" in check.message
    assert not check.alarming


def probes(curve: Sequence[int], ladder: Sequence[int], flat: int = 0, fell: int = 0) -> GradientProbes:
    """All in hundredths, of 1,000 images."""
    return GradientProbes(
        tuple(Point(0.1 * place, 20, Proportion(10 * right, 1000)) for place, right in enumerate(curve)),
        tuple(Point(0.1, 10 * place, Proportion(10 * right, 1000)) for place, right in enumerate(ladder, 1)),
        Proportion(10 * flat, 1000),
        Proportion(10 * fell, 1000),
    )


@pytest.mark.parametrize(
    ("found", "names"),
    [
        (probes([90, 60, 62, 5], [60, 61], 2, 5), []),
        (probes([90, 60, 63, 5], [60, 61]), ["larger_radius_weaker"]),
        (probes([90, 60, 50, 5], [70, 60, 62]), ["more_steps_weaker"]),
        (probes([90, 60, 50, 15], [60, 60]), []),
        (probes([90, 60, 50, 16], [60, 60]), ["large_radius_survived"]),
        (probes([90, 60, 50, 5], [60, 60], flat=3), ["zero_gradients"]),
        (probes([90, 60, 50, 5], [60, 60], fell=6), ["loss_not_rising"]),
    ],
)
def test_limits_of_the_probes(found: GradientProbes, names: list[str]) -> None:
    """Each by one hundredth: up to the limit there is no alarm."""
    assert [check.name for check in alarms(gradient_checks(found, guessing=0.1))] == names


@pytest.mark.parametrize(("images", "limit"), [(1000, 0.01), (300, 0.01), (100, 0.03), (60, 0.05), (20, 0.1), (5, 0.1)])
def test_a_few_images_of_a_small_sample_are_no_alarm(images: int, limit: float) -> None:
    assert Check("more_steps_weaker", 0.0, "", images).limit == pytest.approx(limit)
    assert Check("integer_above_float", 0.0, "").limit == 0.003, "whose limit is promised, however few they are"


def test_an_end_to_end_file_within_the_limit_is_no_alarm() -> None:
    compared = EndToEndComparison(0.5, "photo.jpg", Proportion(9, 10), 0.1, Proportion(10, 10))
    (check,) = end_to_end_differs(compared)
    assert not check.alarming, "decoders may differ, as long as the graph's own steps do not"
