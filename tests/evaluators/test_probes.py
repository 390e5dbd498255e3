from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.evaluators.defects import misled
from tests.evaluators.greys import (
    EPS,
    SIDE,
    By,
    Norm,
    a_plan,
    above,
    conditions,
    flat_images,
    noise_images,
    random_model,
    threshold,
)
from toolkit.artifacts import Normalization, Proportion, Split
from toolkit.attacks.threat import PgdPlan
from toolkit.evaluators import probes
from toolkit.evaluators.evaluation import Conditions
from toolkit.evaluators.probes import PROBED_IMAGES, RADII, GradientProbes, probe_gradients, probe_inputs
from toolkit.evaluators.robustness import arm

pytestmark = pytest.mark.usefixtures("quiet")


def probed(split: Split, how: Conditions | None = None) -> GradientProbes:
    how = how or conditions(a_plan(10, step_size=0.025))
    return probe_gradients(arm({"float": threshold()}, how)["float"], above(0.5), split, how)


def test_the_curve_is_the_share_of_images_farther_from_the_boundary_than_the_radius() -> None:
    """The closed form at every radius; the distance of a flat image is that of its grey value."""
    values = list(range(3, 256, 7))
    found = probed(flat_images(values))
    assert [point.eps for point in found.curve] == pytest.approx([0, *(EPS * factor for factor in RADII), 1.0])
    assert [point.steps for point in found.curve] == [0] + [10] * (len(RADII) + 1)
    for point in found.curve:
        expected = sum(abs(value / 255 - 0.5) > point.eps for value in values)
        assert point.robust == Proportion(expected, len(values))
    assert found.curve[-1].robust.correct == 0 and found.curve[0].robust.correct == len(values)


def test_images_that_are_wrong_clean_are_never_robust() -> None:
    """The graph is wrong on 0.55, and right where the attack on the surrogate takes it, beyond 0.56."""
    how = conditions(a_plan(10, step_size=0.025))
    graph = By(lambda mean: (mean > 0.5) & (mean < 0.56))
    found = probe_gradients(arm({"float": threshold()}, how)["float"], graph, flat_images([140], labels=[0]), how)
    assert all(point.robust == Proportion(0, 1) for point in found.curve + found.ladder)


def test_the_ladder_goes_from_a_tenth_of_the_steps_to_twice_as_many() -> None:
    found = probed(flat_images([100, 110, 145, 160, 250]))
    assert [(point.steps, point.eps) for point in found.ladder] == [(1, EPS), (5, EPS), (10, EPS), (20, EPS)]
    assert {point.robust for point in found.ladder} == {Proportion(3, 5)}, "0.43 and 0.57 fall, 0.39 does not"


@pytest.mark.parametrize(("steps", "counts"), [(1, [1, 2]), (2, [1, 2, 4]), (7, [1, 4, 7, 14])])
def test_short_plans_have_a_ladder_too(steps: int, counts: list[int]) -> None:
    found = probed(flat_images([140]), conditions(a_plan(steps)))
    assert [point.steps for point in found.ladder] == counts


@pytest.mark.parametrize(
    ("norm", "eps", "largest"),
    [
        ("linf", 0.1, 1.0),
        ("linf", 0.4, 1.6),
        ("l2", 0.01, SIDE),
        ("l2", 3.0, 12.0),
        ("l1", 0.02, SIDE**2),
        ("l1", 12.0, 48.0),
    ],
)
def test_the_largest_radius_reaches_from_black_to_white(norm: Norm, eps: float, largest: float) -> None:
    found = probed(flat_images([0, 255]), conditions(a_plan(10, norm=norm, eps=eps, step_size=eps / 4)))
    assert found.curve[-1].eps == pytest.approx(largest)
    assert found.curve[-1].robust == Proportion(0, 2)
    radii = [point.eps for point in found.curve]
    assert radii == sorted(radii) and len(set(radii)) == len(radii)


def test_a_radius_behind_the_normalisation_is_in_its_units() -> None:
    """With a standard deviation of 1/4, a radius of 4 is all pixels."""
    how = conditions(a_plan(10, eps=0.1, clip=False))
    how = replace(how, normalization=Normalization((0.5,), (0.25,)))
    assert probed(flat_images([140]), how).curve[-1].eps == pytest.approx(4.0)


def test_steps_grow_with_the_radius_and_restarts_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[PgdPlan] = []
    original = probes._robust

    def spy(surrogate: object, primary: object, split: object, plan: PgdPlan, *others: object) -> Proportion:
        plans.append(plan)
        return original(surrogate, primary, split, plan, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(probes, "_robust", spy)
    probed(flat_images([140]), conditions(a_plan(10, step_size=0.02, restarts=5, random_start=True)))
    assert all(plan.restarts == 1 and plan.random_start for plan in plans)
    curve, ladder = plans[: len(RADII) + 1], plans[len(RADII) + 1 :]
    assert all(plan.step_size / plan.threat.eps == pytest.approx(0.2) for plan in curve)
    assert [plan.step_size for plan in ladder] == pytest.approx([EPS, EPS / 2, EPS / 4, EPS / 8])


def test_zero_gradients_and_falling_losses_are_counted() -> None:
    """Half of the images have no gradient, a quarter one of the wrong sign."""

    def change(gradient: Tensor) -> Tensor:
        factor = torch.tensor([0.0, 0.0, -1.0, 1.0]).repeat(len(gradient) // 4 + 1)[: len(gradient)]
        return gradient * factor.view(-1, 1, 1, 1)

    how = conditions(a_plan(5, step_size=0.02))
    surrogate = arm({"float": misled(change)}, how)["float"]
    found = probe_gradients(surrogate, above(0.5), flat_images([20, 240] * 10), how)
    assert found.zero_gradients == Proportion(10, 20)
    assert found.loss_fell == Proportion(5, 20)


def test_the_same_seed_gives_the_same_probes() -> None:
    model = random_model()
    split = noise_images(50, model)

    def found(seed: int) -> GradientProbes:
        how = conditions(a_plan(3, eps=0.04, step_size=0.01, random_start=True), seed=seed)
        return probe_gradients(arm({"float": model}, how)["float"], model, split, how)

    assert found(1) == found(1)
    assert any(found(1) != found(seed) for seed in (2, 3, 4))


def test_so_many_images_are_probed_at_most() -> None:
    split = flat_images([10] * PROBED_IMAGES + [240] * 8)
    assert probe_inputs(above(0.5), split).accuracy.total == PROBED_IMAGES
    assert probed(split, conditions(a_plan(1))).zero_gradients.total == PROBED_IMAGES


def test_forms_of_images_are_counted_by_hand() -> None:
    """Grey 10, 100, 140, 250 before a threshold of 0.5: forms are classified as their values stand to it.

    [0, 255]: all bright. [-1, 1]: -0.92, -0.22, 0.10, 0.96. Standardised: -1.17, -0.26, 0.15, 1.28. Negative: turned.
    """
    found = probe_inputs(above(0.5), flat_images([10, 100, 140, 250]))
    assert found.accuracy == Proportion(4, 4)
    assert {form: share.correct for form, share in found.others.items()} == {
        "pixels in [0, 255]": 2,
        "pixels in [-1, 1]": 3,
        "pixels standardised by channel": 3,
        "negative images": 0,
    }
    assert found.changed == Proportion(0, 4) and found.majority == 0.5


def test_the_share_of_the_commonest_class_is_what_guessing_reaches() -> None:
    assert probe_inputs(above(0.5), flat_images([10, 20, 30, 250])).majority == 0.75


class Positional:
    """The label depends on the place in the batch: on what only the order changes, or only the size of the batch."""

    def __init__(self, by: str) -> None:
        self.by = by

    def predict(self, images: Tensor) -> Tensor:
        count = len(images)
        answer = torch.arange(count) == 0 if self.by == "order" else torch.full((count,), count > 3)
        return torch.nn.functional.one_hot(answer.long(), 2).float()


@pytest.mark.parametrize(("by", "changed"), [("order", 3), ("size", 6)])
def test_images_are_predicted_in_another_order_and_in_smaller_batches(by: str, changed: int) -> None:
    """First of six, of six from behind, and of two halves: images 0, 5 and 3; six together and three apart: all."""
    assert probe_inputs(Positional(by), flat_images([10] * 6)).changed == Proportion(changed, 6)


def test_one_image_can_be_probed() -> None:
    found = probe_inputs(above(0.5), flat_images([250]))
    assert found.changed == Proportion(0, 1) and math.isclose(found.majority, 1.0)
