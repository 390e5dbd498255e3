"""What every attack owes: its threat model, its seed, and the say of the graph that counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.attacks.problems import Judge, Problem, a_hyperplane, a_problem, never
from tests.toys import RGB
from toolkit.artifacts import Predictor
from toolkit.attacks.apgd import apgd, apgd_targeted
from toolkit.attacks.carlini_wagner import carlini_wagner
from toolkit.attacks.deepfool import deepfool
from toolkit.attacks.fab import fab_targeted
from toolkit.attacks.fgsm import fgsm
from toolkit.attacks.fmn import fmn
from toolkit.attacks.losses import margin
from toolkit.attacks.mim import mim
from toolkit.attacks.minimum_norm import MinimumNorm
from toolkit.attacks.pgd import largest_violation, rounding
from toolkit.attacks.projections import NORM
from toolkit.attacks.square import LONG, LOOKS, PATIENCE, square
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.survivors import Settle
from toolkit.attacks.threat import ThreatModel
from toolkit.evaluators.accuracy import right

Norm = Literal["linf", "l2", "l1"]
Space = Literal["pixels", "normalised"]
Attack = Callable[[Surrogate, Tensor, Tensor, ThreatModel, int, Settle | None], Tensor | MinimumNorm]
"""(surrogate, images, labels, threat, seed, settle)"""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


STEPS = 12
RANDOM: Mapping[str, Attack] = {
    "apgd-ce": lambda s, x, y, t, seed, settle: apgd(s, x, y, t, steps=STEPS, generator=seeded(seed), settle=settle),
    "apgd-dlr": lambda s, x, y, t, seed, settle: apgd(
        s, x, y, t, steps=STEPS, generator=seeded(seed), loss="dlr", settle=settle
    ),
    "apgd-margin": lambda s, x, y, t, seed, settle: apgd(
        s, x, y, t, steps=STEPS, generator=seeded(seed), loss="margin", settle=settle
    ),
    "apgd-t": lambda s, x, y, t, seed, settle: apgd_targeted(
        s, x, y, t, steps=STEPS, rank=1, generator=seeded(seed), settle=settle
    ),
    "fab-t": lambda s, x, y, t, seed, settle: fab_targeted(
        s, x, y, t, steps=STEPS, rank=1, generator=seeded(seed), restarts=2, settle=settle
    ),
}
FIXED: Mapping[str, Attack] = {
    "fgsm": lambda s, x, y, t, _, settle: fgsm(s, x, y, t, settle=settle),
    "mim": lambda s, x, y, t, _, settle: mim(s, x, y, t, steps=STEPS, settle=settle),
    "fmn": lambda s, x, y, t, _, settle: fmn(s, x, y, t, steps=STEPS, settle=settle),
    "deepfool": lambda s, x, y, t, _, settle: deepfool(s, x, y, t, steps=STEPS, settle=settle),
    "carlini-wagner": lambda s, x, y, t, _, settle: carlini_wagner(s, x, y, t, steps=STEPS, searches=4, settle=settle),
}
ATTACKS = {**RANDOM, **FIXED}
LIMITED: Mapping[str, tuple[Norm, ...]] = {"deepfool": ("linf", "l2"), "carlini-wagner": ("l2",)}
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
CASES = [(name, norm) for name in ATTACKS for norm in LIMITED.get(name, NORMS)]
MINIMUM_NORM = [case for case in CASES if case[0] in ("fab-t", "fmn", "deepfool", "carlini-wagner")]
EPS: Mapping[Norm, float] = {"linf": 0.05, "l2": 0.5, "l1": 3.0}
"""Radii at which some of the images of `a_problem` fall and some do not."""
EVERYTHING: Mapping[Norm, float] = {"linf": 1.0, "l2": 20.0, "l1": 200.0}


def a_threat(norm: Norm, *, eps: float | None = None, space: Space = "pixels", clip: bool = True) -> ThreatModel:
    return ThreatModel(norm, eps or EPS[norm], space, clip)


def attacked_by(
    name: str, surrogate: Surrogate, problem: Problem, threat: ThreatModel, seed: int = 0, settle: Settle | None = None
) -> Tensor:
    found = ATTACKS[name](surrogate, problem.images, problem.labels, threat, seed, settle)
    return (found.attacked if isinstance(found, MinimumNorm) else found).cpu()


@pytest.mark.parametrize(("name", "norm"), CASES)
@pytest.mark.parametrize(("space", "clip"), [("pixels", True), ("normalised", False), ("normalised", True)])
def test_attacked_images_stay_within_the_threat_model(name: str, norm: Norm, space: Space, clip: bool) -> None:
    problem, threat = a_problem(), a_threat(norm, space=space, clip=clip)
    normalization = problem.model.spec.normalization
    attacked = attacked_by(name, problem.surrogate(), problem, threat)
    assert attacked.shape == problem.images.shape and attacked.dtype == torch.float32
    violation = largest_violation(attacked, problem.images, threat, normalization)
    assert violation <= rounding(attacked.shape, threat, normalization)
    assert not torch.equal(attacked, problem.images)


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_the_surrogate_may_compute_in_bfloat16(name: str, norm: Norm) -> None:
    problem, threat = a_problem(), a_threat(norm)
    attacked = attacked_by(name, problem.surrogate("bfloat16"), problem, threat)
    assert bool(attacked.isfinite().all())
    normalization = problem.model.spec.normalization
    assert largest_violation(attacked, problem.images, threat, normalization) <= 1e-4


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_equal_seeds_give_equal_images(name: str, norm: Norm) -> None:
    problem, threat = a_problem(), a_threat(norm)
    first, second, other = (attacked_by(name, problem.surrogate(), problem, threat, seed) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    # only restarts of FAB are random, and the first may be the closest
    assert torch.equal(first, other) == (name in FIXED) or name == "fab-t"


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_images_are_dropped_as_soon_as_they_are_settled_and_not_before(name: str, norm: Norm) -> None:
    problem, threat = a_problem(), a_threat(norm, eps=EVERYTHING[norm])
    judge = Judge({0, 2, 3}, after=2)
    attacked = attacked_by(name, problem.surrogate(), problem, threat, settle=judge)
    if name == "fgsm":
        assert all(len(seen) == 1 for seen in judge.seen.values())
        return
    dropped = [position for position in (0, 2, 3) if len(judge.seen.get(position, [])) >= 2]
    assert dropped, "at least one image was submitted often enough"
    for position in dropped:
        assert len(judge.seen[position]) == 2, "never again once it was settled"
        assert torch.equal(attacked[position], judge.seen[position][-1]), "the candidate itself is the result"


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_a_judge_who_never_agrees_changes_nothing(name: str, norm: Norm) -> None:
    problem, threat = a_problem(), a_threat(norm)
    free, judged = problem.surrogate(), problem.surrogate()
    expected = attacked_by(name, free, problem, threat)
    found = attacked_by(name, judged, problem, threat, settle=never())
    assert torch.equal(found, expected)
    assert judged.gradients == free.gradients, "all steps ran"


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_a_judge_who_always_agrees_ends_the_attack(name: str, norm: Norm) -> None:
    problem, threat = a_problem(), a_threat(norm, eps=EVERYTHING[norm])
    judge = Judge(set(range(len(problem.labels))))
    attacked = attacked_by(name, problem.surrogate(), problem, threat, settle=judge)
    for position, seen in judge.seen.items():
        assert len(seen) == 1 and torch.equal(attacked[position], seen[0])


@pytest.mark.parametrize(("name", "norm"), CASES)
def test_two_classes_and_one_image_are_enough(name: str, norm: Norm) -> None:
    problem, threat = a_problem(1, classes=2), a_threat(norm)
    attacked = attacked_by(name, problem.surrogate(), problem, threat)
    assert largest_violation(attacked, problem.images, threat, problem.model.spec.normalization) <= 1e-4


ONE_PIXEL_PER_STEP = [("fgsm", "l1"), ("mim", "l1")]


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case not in ONE_PIXEL_PER_STEP])
def test_nothing_withstands_a_ball_that_holds_every_image(name: str, norm: Norm) -> None:
    plane = a_hyperplane(20)
    problem = Problem(plane.model, plane.images, plane.labels)
    attacked = attacked_by(name, problem.surrogate(), problem, a_threat(norm, eps=EVERYTHING[norm]))
    assert bool(problem.fooled(attacked).all())


@pytest.mark.parametrize(("name", "norm"), MINIMUM_NORM)
@pytest.mark.parametrize(("space", "clip"), [("pixels", True), ("normalised", False)])
def test_the_closest_points_fool_the_surrogate_at_the_norms_given(
    name: str, norm: Norm, space: Space, clip: bool
) -> None:
    problem, threat = a_problem(), a_threat(norm, space=space, clip=clip)
    result = ATTACKS[name](problem.surrogate(), problem.images, problem.labels, threat, 0, None)
    assert isinstance(result, MinimumNorm)
    found = result.found
    assert bool(found.any())
    assert torch.equal(problem.fooled(result.closest)[found], torch.ones(int(found.sum()), dtype=torch.bool))
    assert torch.equal(result.closest[~found], problem.images[~found])
    scale = threat.pixel_scale(problem.model.spec.normalization)
    sizes = NORM[norm]((result.closest - problem.images) / scale)
    assert torch.allclose(sizes[found], result.norms[found], rtol=1e-5)
    if clip:
        assert float(result.closest.min()) >= 0 and float(result.closest.max()) <= 1
    within = found & (result.norms <= threat.eps)
    assert torch.equal(problem.fooled(result.attacked)[within], torch.ones(int(within.sum()), dtype=torch.bool))


@pytest.mark.parametrize(("name", "norm"), MINIMUM_NORM)
def test_an_image_that_the_surrogate_gets_wrong_is_at_distance_0(name: str, norm: Norm) -> None:
    problem = a_problem()
    wrong = (problem.labels + 1) % 5
    result = ATTACKS[name](problem.surrogate(), problem.images, wrong, a_threat(norm), 0, None)
    assert isinstance(result, MinimumNorm)
    assert torch.equal(result.norms, torch.zeros(len(wrong))) and torch.equal(result.closest, problem.images)


class Calls:
    """The network as something that gives logits alone, and how often each image was asked about."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor, self.images = predictor, 0

    def predict(self, images: Tensor) -> Tensor:
        self.images += len(images)
        return self._predictor.predict(images)


def run_square(
    problem: Problem,
    threat: ThreatModel,
    *,
    queries: int = 40,
    seed: int = 0,
    start: Tensor | None = None,
    reachable_only: bool = False,
    settle: Settle | None = None,
) -> tuple[Tensor, int]:
    target = Calls(problem.model)
    attacked = square(
        target,
        problem.images,
        problem.labels,
        threat,
        problem.model.spec.normalization,
        queries=queries,
        generator=seeded(seed),
        start=start,
        reachable_only=reachable_only,
        settle=settle,
    )
    return attacked, target.images


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("space", "clip"), [("pixels", True), ("normalised", False), ("normalised", True)])
def test_square_stays_within_the_threat_model_and_repeats_with_its_seed(norm: Norm, space: Space, clip: bool) -> None:
    problem, threat = a_problem(), a_threat(norm, space=space, clip=clip)
    first, second, other = (run_square(problem, threat, seed=seed)[0] for seed in (0, 0, 1))
    normalization = problem.model.spec.normalization
    assert largest_violation(first, problem.images, threat, normalization) <= rounding(
        first.shape, threat, normalization
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("norm", NORMS)
def test_square_asks_no_more_than_it_may_and_ends_where_the_target_is_fooled(norm: Norm) -> None:
    problem = a_problem()
    _, asked = run_square(problem, a_threat(norm, eps=1e-4))
    assert asked == 40 * len(problem.labels), "nothing fell, so all queries were made"
    plane = a_hyperplane(20)
    easy = Problem(plane.model, plane.images, plane.labels)
    attacked, asked = run_square(easy, a_threat(norm, eps=EVERYTHING[norm]), queries=400)
    assert bool(easy.fooled(attacked).all()) and asked < 400 * 20


def test_square_asks_the_judge_about_logits_that_are_no_numbers() -> None:
    class Brittle:
        """Breaks off the grid of 8 bits."""

        def predict(self, images: Tensor) -> Tensor:
            logits = problem.model.predict(images)
            off = ((255 * images - (255 * images).round()).abs() > 0.01).flatten(1).any(dim=1)
            return logits.masked_fill(off[:, None], torch.nan)

    problem, broken = a_problem(), Brittle()
    images = (255 * problem.images).round() / 255
    asked = torch.zeros(len(images), dtype=torch.bool)

    def settle(attacked: Tensor, positions: Tensor) -> Tensor:
        asked[positions] = True
        return ~right(broken.predict(attacked), problem.labels[positions])

    generator = torch.Generator().manual_seed(0)
    threat = ThreatModel("linf", 0.013, "pixels", clip=True)
    attacked = square(broken, images, problem.labels, threat, RGB, queries=5, generator=generator, settle=settle)
    assert bool(asked.all()) and not bool(right(broken.predict(attacked), problem.labels).any())


@pytest.mark.parametrize("norm", NORMS)
def test_square_raises_the_margin(norm: Norm) -> None:
    problem, threat = a_problem(), a_threat(norm)
    few, _ = run_square(problem, threat, queries=1, settle=never())
    many, _ = run_square(problem, threat, queries=60, settle=never())
    before, after = (margin(problem.model.predict(images), problem.labels) for images in (few, many))
    assert bool((after >= before).all()) and bool((after > before).any())


@pytest.mark.parametrize("norm", NORMS)
def test_square_drops_what_is_settled_and_nothing_else(norm: Norm) -> None:
    problem, threat = a_problem(), a_threat(norm, eps=EVERYTHING[norm])
    judge = Judge({0, 2})
    attacked, _ = run_square(problem, threat, settle=judge)
    for position in {0, 2} & set(judge.seen):
        assert len(judge.seen[position]) == 1 and torch.equal(attacked[position], judge.seen[position][0])
    expected, asked_before = run_square(problem, a_threat(norm), settle=never())
    again, asked_after = run_square(problem, a_threat(norm), settle=Judge(set()))
    assert torch.equal(expected, again) and asked_before == asked_after == 40 * len(problem.labels)


@pytest.mark.parametrize("norm", NORMS)
def test_square_works_on_two_classes_and_one_image(norm: Norm) -> None:
    problem = a_problem(1, classes=2)
    attacked, _ = run_square(problem, a_threat(norm))
    assert largest_violation(attacked, problem.images, a_threat(norm), problem.model.spec.normalization) <= 1e-4


@pytest.mark.parametrize("norm", NORMS)
def test_square_goes_on_from_where_another_attack_ended(norm: Norm) -> None:
    """Never behind its start, within the ball."""
    problem, threat = a_problem(), a_threat(norm)
    start = problem.images.clone()
    attacked, _ = run_square(problem, threat, start=start, settle=never())
    before, after = (margin(problem.model.predict(images), problem.labels) for images in (start, attacked))
    assert bool((after >= before).all()) and bool((after > before).any())
    assert torch.equal(start, problem.images), "the start is left as it was"
    assert largest_violation(attacked, problem.images, threat, problem.model.spec.normalization) <= 1e-4
    unmoved, _ = run_square(problem, threat, start=start, queries=1, settle=never())
    assert torch.equal(unmoved, start)


def test_square_gives_up_where_nothing_is_to_be_gained_on_and_goes_on_where_something_is() -> None:
    """At the corner of the ball that is the worst of a linear network nothing rises; from the image itself it does."""
    plane = a_hyperplane(8)
    problem, threat = Problem(plane.model, plane.images, plane.labels), a_threat("linf", eps=1e-3)
    slope = problem.surrogate().gradient(problem.images, problem.labels)
    corner = (problem.images + threat.eps * slope.sign()).clamp(0, 1)
    stands = ~problem.fooled(corner)
    problem, corner = Problem(plane.model, problem.images[stands], problem.labels[stands]), corner[stands]
    assert len(corner) >= 5
    _, asked = run_square(problem, threat, start=corner, queries=400)
    assert asked == min(PATIENCE) * len(problem.labels)
    _, asked = run_square(problem, threat, start=corner, queries=min(PATIENCE) - 1)
    assert asked == (min(PATIENCE) - 1) * len(problem.labels)
    wide = a_threat("linf", eps=EVERYTHING["linf"])
    attacked, _ = run_square(problem, wide, start=problem.images, queries=2000)
    assert bool(problem.fooled(attacked).all())


def test_a_long_search_from_stripes_gives_up_what_is_out_of_reach_if_it_may_and_nothing_else() -> None:
    plane, far, near = a_hyperplane(8), a_threat("linf", eps=1e-3), a_threat("linf", eps=EVERYTHING["linf"])
    problem = Problem(plane.model, plane.images, plane.labels)
    slope = problem.surrogate().gradient(problem.images, problem.labels)
    stands = ~problem.fooled((problem.images + far.eps * slope.sign()).clamp(0, 1))
    problem, standing = Problem(plane.model, problem.images[stands], problem.labels[stands]), int(stands.sum())
    assert standing >= 5
    _, first, *_ = LOOKS
    _, asked = run_square(problem, far, queries=LONG, reachable_only=True)
    assert asked == int(first * LONG) * standing, "the first look has nothing to compare with"
    for queries, reachable_only in ((LONG, False), (LONG - 1, True)):
        _, asked = run_square(problem, far, queries=queries, reachable_only=reachable_only)
        assert asked == queries * standing
    attacked, _ = run_square(problem, near, queries=LONG, reachable_only=True)
    assert bool(problem.fooled(attacked).all())


def test_a_long_search_from_stripes_goes_on_where_it_rises_fast_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two targets whose margin rises by 1 with every query, the one that is near enough is attacked to the end."""

    class Rising:
        """A target whose margin begins at `-need` and rises by 1 with every query."""

        def __init__(self, need: float) -> None:
            self.need, self.queries = need, 0

        def predict(self, images: Tensor) -> Tensor:
            self.queries += 1
            return torch.tensor([[self.need - self.queries, 0.0]]).repeat(len(images), 1)

    problem, labels = a_problem(1, classes=2), torch.zeros(1, dtype=torch.int64)
    monkeypatch.setattr("toolkit.attacks.square.LOOKS", {0.2: torch.inf, 0.4: 2.0})
    for need, queries in ((799.0, 1000), (801.0, 400)):  # 400 and twice the 200 since the first look are 800
        target = Rising(need)
        square(
            target,
            problem.images,
            labels,
            a_threat("linf"),
            problem.model.spec.normalization,
            queries=1000,
            generator=seeded(0),
            reachable_only=True,
            settle=never(),
        )
        assert target.queries == queries
