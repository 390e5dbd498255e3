from __future__ import annotations

from itertools import pairwise
from typing import Literal

import pytest
import torch

from tests.attacks.problems import Hyperplane, Judge, a_hyperplane, a_problem
from tests.toys import RGB, linear_model
from toolkit.attacks import apgd as module
from toolkit.attacks.apgd import LOSSES, apgd, apgd_targeted
from toolkit.attacks.apgd_l1 import PHASES, budgets
from toolkit.attacks.losses import ranked_targets, targeted_dlr
from toolkit.attacks.pgd import largest_violation, rounding
from toolkit.attacks.surrogate import Loss, Slope, Surrogate
from toolkit.attacks.threat import ThreatModel

Norm = Literal["linf", "l2", "l1"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("space", ["pixels", "normalised"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_linear_network_the_attack_finds_the_optimum(norm: Norm, space: Literal["pixels", "normalised"]) -> None:
    plane, threat = a_hyperplane(), ThreatModel(norm, 0.1, space, clip=False)
    scale = threat.pixel_scale(RGB)
    along = plane.weight * scale
    best = along.sign() if norm == "linf" else along / along.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    attacked = apgd(plane.surrogate(), plane.images, plane.labels, threat, steps=40, generator=seeded(), loss="margin")
    gain = (plane.weight * (attacked.cpu() - plane.images)).flatten(1).sum(dim=1)
    most = (plane.weight * scale * 0.1 * best).flatten(1).sum(dim=1)
    assert torch.allclose(gain, most, rtol=1e-3)


@pytest.mark.parametrize("clip", [True, False])
def test_in_l1_it_comes_near_the_optimum_of_a_linear_network(clip: bool) -> None:
    """Within the pixel range the optimum fills pixels one after another, those of the steepest gradient first."""
    plane, threat = a_hyperplane(), ThreatModel("l1", 3.0, "pixels", clip)
    attacked = apgd(plane.surrogate(), plane.images, plane.labels, threat, steps=100, generator=seeded(), loss="margin")
    gain = (plane.weight * (attacked.cpu() - plane.images)).flatten(1).sum(dim=1)
    along, images = plane.weight.flatten(1), plane.images.flatten(1)
    room = torch.where(along > 0, 1 - images, images) if clip else torch.full_like(images, torch.inf)
    rooms = room.gather(1, along.abs().argsort(dim=1, descending=True))
    before = torch.cat((torch.zeros(6, 1), rooms.cumsum(dim=1)[:, :-1]), dim=1)
    filled = torch.minimum(rooms, (3.0 - before).clamp_min(0))
    most = (along.abs().sort(dim=1, descending=True).values * filled).sum(dim=1)
    assert bool((gain <= most * (1 + 1e-4)).all()) and bool((gain >= 0.99 * most).all())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_result_has_the_highest_loss_of_all_steps(norm: Norm) -> None:
    problem, threat = a_problem(), ThreatModel(norm, {"linf": 0.02, "l2": 0.2, "l1": 1.0}[norm], "pixels", clip=True)

    class Watching(Surrogate):
        """Notes the highest loss of every image in the last ball."""

        def differentiate(self, images: torch.Tensor, loss: object) -> Slope:
            slope = super().differentiate(images, loss)  # type: ignore[arg-type]
            delta = (images - problem.images).abs().flatten(1).sum(dim=1)
            inside = delta <= threat.eps * 1.001 if norm == "l1" else delta >= 0
            highest.append(torch.where(inside, slope.loss, -torch.inf))
            return slope

    highest: list[torch.Tensor] = []
    surrogate = Watching(problem.model.module, RGB)
    attacked = apgd(surrogate, problem.images, problem.labels, threat, steps=20, generator=seeded(), loss="margin")
    assert len(highest) == 20, "no more gradients than asked for"
    reached = LOSSES["margin"](problem.model.predict(attacked), problem.labels)
    assert torch.allclose(reached, torch.stack(highest).amax(dim=0), atol=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_targeted_attack_raises_the_class_of_its_rank(norm: Norm) -> None:
    generator = seeded(1)
    model = linear_model(torch.randn(5, 48, generator=generator), (3, 4, 4), RGB)
    images = torch.rand(8, 3, 4, 4, generator=generator)
    labels = model.predict(images).argmax(dim=1)
    targets = ranked_targets(model.predict(images), labels)
    # so small that the leading logits, which the loss is measured by, hardly change
    threat = ThreatModel(norm, {"linf": 0.01, "l2": 0.06, "l1": 0.2}[norm], "pixels", clip=True)
    reached = torch.zeros(4, 4)
    for rank in range(4):
        attacked = apgd_targeted(
            Surrogate(model.module, RGB), images, labels, threat, steps=40, rank=rank + 1, generator=seeded()
        )
        logits = model.predict(attacked)
        for other in range(4):
            reached[rank, other] = targeted_dlr(logits, labels, targets[:, other]).mean()
    assert reached.argmax(dim=0).tolist() == [0, 1, 2, 3], "nothing brings a class as near as aiming at it"


def hyperplanes(count: int = 9) -> tuple[Hyperplane, torch.Tensor]:
    """Images, and their distances from the boundary in l-inf without a pixel range."""
    problem = a_hyperplane(count)
    scale = ThreatModel("linf", 1.0, "pixels", clip=False).pixel_scale(RGB)
    return problem, problem.distance("linf", scale)


@pytest.mark.parametrize(("steps", "asked"), [(60, True), (49, False)])
def test_a_long_targeted_attack_gives_up_what_it_will_not_reach(
    steps: int, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a hyperplane the loss no longer rises after a few steps: what the ball takes less than 0.4, 0.6 or 0.65 of the
    way to the boundary is left after a twentieth, a tenth or a quarter of the steps, what lies beyond the radius and
    the slack halfway."""
    problem, distances = hyperplanes()
    threat = ThreatModel("linf", float(distances.sort().values[3]) * 1.01, "pixels", clip=False)
    seen: list[int] = []
    differentiate = Surrogate.differentiate

    def spy(self: Surrogate, images: torch.Tensor, loss: Loss) -> Slope:
        seen.append(len(images))
        return differentiate(self, images, loss)

    monkeypatch.setattr(Surrogate, "differentiate", spy)
    judged: set[int] = set()

    def settle(_: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        judged.update(positions.tolist())
        return torch.zeros(len(positions), dtype=torch.bool)

    results = [
        apgd_targeted(
            problem.surrogate(), problem.images, problem.labels, threat,
            steps=steps, rank=1, generator=seeded(), reachable_only=reachable_only, settle=settle,
        )
        for reachable_only in (True, False)
    ]  # fmt: skip
    part, whole = seen[:steps], seen[steps:]
    assert whole == [9] * steps and judged == set(range(9))
    begun, early, climbed, kept = (int((threat.eps / distances > way).sum()) for way in (0.4, 0.6, 0.65, 0.9))
    looks = (0, steps // 20, steps // 10, steps // 4, steps // 2, steps)
    standing = zip((9, begun, early, climbed, kept), pairwise(looks), strict=True)
    expected = [left for left, (last, look) in standing for _ in range(look - last)]
    assert part == (expected if asked else whole) and 4 <= kept < climbed <= early < begun < 9
    wrong = [problem.model.predict(result).argmax(dim=1) != problem.labels for result in results]
    assert torch.equal(*wrong) and torch.equal(wrong[0], distances < threat.eps)
    torch.testing.assert_close(results[0], results[1], atol=2e-3, rtol=0)


def test_all_images_may_be_given_up() -> None:
    problem, distances = hyperplanes(4)
    threat = ThreatModel("linf", float(distances.min()) / 4, "pixels", clip=False)
    attacked = apgd_targeted(
        problem.surrogate(), problem.images, problem.labels, threat,
        steps=60, rank=1, generator=seeded(), reachable_only=True,
    )  # fmt: skip
    expected = problem.images + threat.eps * problem.weight.sign()
    torch.testing.assert_close(attacked, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("norm", ["linf", "l1"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_are_enough_to_give_a_result(norm: Norm, steps: int) -> None:
    problem, threat = a_problem(), ThreatModel(norm, 0.1, "pixels", clip=True)
    surrogate = problem.surrogate()
    attacked = apgd(surrogate, problem.images, problem.labels, threat, steps=steps, generator=seeded())
    assert attacked.shape == problem.images.shape
    assert surrogate.gradients == steps * len(problem.labels)


def test_checks_fall_where_the_paper_has_them() -> None:
    """Of 100 steps: periods of 22, 19, 16, 13, 10, 7, and 6 from there on."""
    assert sorted(module._checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert module._checkpoints(1) == frozenset()


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 50, 100])
def test_the_phases_in_l1_share_all_steps_and_the_last_has_some(steps: int) -> None:
    found = budgets(steps)
    assert sum(found) == steps and found[-1] >= 1 and min(found) >= 0
    if steps >= 10:
        assert found == tuple(round(share * steps) for _, share in PHASES)


def a_state(count: int) -> module._State:
    images = torch.zeros(count, 1, 2, 2)
    slope = Slope(torch.zeros(count, 2), torch.zeros(count), torch.zeros_like(images))
    labels = torch.zeros(count, dtype=torch.int64)
    return module._begin(images, labels, labels, images, slope, 0.2, None)


def test_steps_are_halved_where_the_loss_stopped_rising_and_start_from_the_best_point() -> None:
    state = a_state(3)
    state.best = torch.ones_like(state.best)
    state.best_gradient = torch.full_like(state.best, 7.0)
    state.best_loss = torch.tensor([1.0, 1.0, 0.0])
    state.checked_loss = torch.zeros(3)
    state.halved = torch.tensor([True, True, False])
    # of 4 steps 3 is not more than 75 %; 4 is; the third rose throughout, yet never beyond its best at the last check
    state.rises = torch.tensor([3, 4, 4])
    module._adapt(state, 4)
    assert state.step.flatten().tolist() == pytest.approx([0.1, 0.2, 0.1])
    assert state.current[:, 0, 0, 0].tolist() == [1.0, 0.0, 1.0]
    assert state.gradient[:, 0, 0, 0].tolist() == [7.0, 0.0, 7.0]
    assert state.rises.tolist() == [0, 0, 0] and state.halved.tolist() == [True, False, True]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_point_that_fools_the_surrogate_is_judged(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the next step goes back to the best point, and where the loss is lower than before."""
    problem, judge = a_problem(12), Judge(set())
    threat = ThreatModel(norm, {"linf": 0.1, "l2": 0.5, "l1": 4.0}[norm], "pixels", clip=True)
    fooling: list[tuple[int, torch.Tensor]] = []
    differentiate = Surrogate.differentiate

    def spy(self: Surrogate, images: torch.Tensor, loss: Loss) -> Slope:
        slope = differentiate(self, images, loss)
        inside = largest_violation(images, problem.images, threat, RGB) <= rounding(images.shape, threat, RGB)
        if inside:  # in l1 the first phases are in larger balls
            rows = (slope.logits.argmax(dim=1) != problem.labels).nonzero()[:, 0].tolist()
            fooling.extend((row, images[row].clone()) for row in rows)
        return slope

    monkeypatch.setattr(Surrogate, "differentiate", spy)
    apgd_targeted(
        problem.surrogate(), problem.images, problem.labels, threat,
        steps=60, rank=2, generator=seeded(), settle=judge,
    )  # fmt: skip
    assert len(fooling) > 100
    for row, image in fooling:
        assert any(torch.equal(image, seen) for seen in judge.seen[row])
