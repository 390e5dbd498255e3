"""Minimum-norm attacks where the smallest perturbation is known: linear networks, with and without a pixel range."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor, nn

from tests.attacks.problems import Hyperplane, a_hyperplane, a_problem
from tests.attacks.test_boundary import smallest
from tests.toys import RGB, linear_model
from toolkit.artifacts import Normalized
from toolkit.attacks.carlini_wagner import carlini_wagner
from toolkit.attacks.deepfool import FURTHER, OVERSHOOT, deepfool
from toolkit.attacks.fab import fab_targeted
from toolkit.attacks.fmn import fmn
from toolkit.attacks.minimum_norm import MinimumNorm
from toolkit.attacks.pgd import largest_violation, rounding
from toolkit.attacks.surrogate import Loss, Slope, Surrogate
from toolkit.attacks.threat import ThreatModel
from toolkit.errors import ToolkitError

Norm = Literal["linf", "l2", "l1"]
Space = Literal["pixels", "normalised"]
Attack = Callable[[Surrogate, Tensor, Tensor, ThreatModel], MinimumNorm]


def fab(surrogate: Surrogate, images: Tensor, labels: Tensor, threat: ThreatModel) -> MinimumNorm:
    return fab_targeted(surrogate, images, labels, threat, steps=20, rank=1, generator=torch.Generator())


ATTACKS: Mapping[str, tuple[Attack, float]] = {
    "fab": (fab, 1.02),
    "fmn": (lambda s, x, y, t: fmn(s, x, y, t, steps=100), 1.02),
    "deepfool": (deepfool, 1 + OVERSHOOT),
}
"""How many times the smallest perturbation they may need."""
NORMS: Mapping[str, tuple[Norm, ...]] = {
    "fab": ("linf", "l2", "l1"),
    "fmn": ("linf", "l2", "l1"),
    "deepfool": ("linf", "l2"),
}
CASES = [(name, norm) for name in ATTACKS for norm in NORMS[name]]


def run(name: str, plane: Hyperplane, threat: ThreatModel) -> MinimumNorm:
    result = ATTACKS[name][0](plane.surrogate(), plane.images, plane.labels, threat)
    return MinimumNorm(result.attacked.cpu(), result.closest.cpu(), result.norms.cpu())


@pytest.mark.parametrize(("name", "norm"), CASES)
@pytest.mark.parametrize("space", ["pixels", "normalised"])
def test_without_a_pixel_range_it_is_the_distance_to_the_hyperplane(name: str, norm: Norm, space: Space) -> None:
    plane, threat = a_hyperplane(), ThreatModel(norm, 1.0, space, clip=False)
    distance = plane.distance(norm, threat.pixel_scale(RGB))
    norms = run(name, plane, threat).norms
    assert bool((norms >= distance * (1 - 1e-4)).all()) and bool(
        (norms <= distance * ATTACKS[name][1] + 2 * FURTHER).all()
    )


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case[0] != "deepfool"])
def test_within_the_pixel_range_it_is_what_a_linear_program_finds(name: str, norm: Norm) -> None:
    """DeepFool is left out: it knows nothing of the range and clips afterwards."""
    plane, threat = a_hyperplane(4), ThreatModel(norm, 1.0, "pixels", clip=True)
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(plane.images.shape, generator=generator).mul(1.6).sub(0.3).clamp(0, 1)
    logits = plane.model.predict(images)
    labels = logits.argmax(dim=1)
    sign = torch.where(labels == plane.labels, 1.0, -1.0).view(-1, 1, 1, 1)
    value = -(logits[:, 0] - logits[:, 1]).abs()
    bounded = Hyperplane(plane.model, images, labels, sign * plane.weight, value)
    norms = run(name, bounded, threat).norms
    for row in range(len(images)):
        low, high = (bound[row].flatten().double().numpy() for bound in (-images, 1 - images))
        weight = bounded.weight[row].flatten().double().numpy()
        best = smallest(norm, weight, float(value[row]), low, high)
        assert best * (1 - 1e-4) <= float(norms[row]) <= best * (ATTACKS[name][1] + 0.01)


@pytest.mark.parametrize("norm", NORMS["deepfool"])
def test_deepfool_needs_one_step_of_known_length_on_a_hyperplane(norm: Norm) -> None:
    plane, threat = a_hyperplane(), ThreatModel(norm, 1.0, "pixels", clip=False)
    distance = plane.distance(norm, torch.ones(1))
    result = deepfool(plane.surrogate(), plane.images, plane.labels, threat, steps=1)
    assert torch.allclose(result.norms.cpu(), (1 + OVERSHOOT) * (distance + FURTHER), rtol=1e-4)


def three_classes() -> tuple[Surrogate, Tensor, Tensor, Tensor]:
    """A linear network of three classes, images, labels, and the l2 distance to either other class, likelier first."""
    generator = torch.Generator().manual_seed(3)
    # gradients of unlike sizes, so that the likeliest other class is not always the nearest
    weight = torch.randn(3, 48, generator=generator) * torch.tensor([1.0, 0.5, 4.0])[:, None]
    model = linear_model(weight, (3, 4, 4), RGB)
    images = torch.rand(40, 3, 4, 4, generator=generator)
    order = model.predict(images).argsort(dim=1, descending=True)
    logits = model.predict(images).gather(1, order)
    per_pixel = (weight.view(3, 3, 16) / torch.tensor(RGB.std).view(1, 3, 1)).flatten(1)[order]
    gaps = torch.linalg.vector_norm(per_pixel[:, 1:] - per_pixel[:, :1], dim=2)
    distances = (logits[:, :1] - logits[:, 1:]) / gaps
    return Surrogate(model.module, RGB), images, order[:, 0], distances


class Rounded(nn.Module):
    """Logits on a grid, as an integer graph gives them; straight-through."""

    def __init__(self, inner: nn.Module, step: float) -> None:
        super().__init__()
        self.inner, self.step = inner, step

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        return logits + ((logits / self.step).round() * self.step - logits).detach()


@pytest.mark.parametrize(("name", "norm"), [case for case in CASES if case[0] != "fmn"])
@pytest.mark.parametrize("step", [0.01, 0.05])
def test_ties_of_rounded_logits_hold_no_attack_up(name: str, norm: Norm, step: float) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(3 * 36, 4)
    linear.weight.data = 0.1 * torch.randn(4, 3 * 36, generator=generator)
    images = torch.rand(60, 3, 6, 6, generator=generator)
    network = Normalized(Rounded(nn.Sequential(nn.Flatten(), linear), step), RGB).eval()
    surrogate = Surrogate(network, RGB, "float32", input_shape=(3, 6, 6))
    first, second = surrogate.logits(images).topk(2).values.T
    images = images[first - second > step / 2]  # those that tie as they are lie on the boundary
    labels = surrogate.logits(images).argmax(dim=1)
    attack = ATTACKS[name][0]
    found = attack(surrogate, images, labels, ThreatModel(norm, 100.0, "pixels", clip=False))
    assert bool(found.norms.isfinite().all())


def test_fab_aims_at_the_class_of_its_rank_and_deepfool_at_the_nearest() -> None:
    surrogate, images, labels, distances = three_classes()
    threat = ThreatModel("l2", 1.0, "pixels", clip=False)
    nearest = distances.amin(dim=1)
    for rank in (1, 2):
        result = fab_targeted(surrogate, images, labels, threat, steps=30, rank=rank, generator=torch.Generator())
        norms = result.norms.cpu()
        # crossing the other boundary on the way counts too, so it may be less than the distance to its own class
        assert bool((norms <= distances[:, rank - 1] * 1.02).all()) and bool((norms >= nearest * 0.999).all())
    found = deepfool(surrogate, images, labels, threat).norms.cpu()
    assert torch.allclose(found, (nearest + FURTHER) * (1 + OVERSHOOT), rtol=0.01)
    one_candidate = deepfool(surrogate, images, labels, threat, candidates=1).norms.cpu()
    assert bool((one_candidate >= found * 0.999).all()) and bool((one_candidate > found * 1.05).any())


@pytest.mark.parametrize("norm", get_args(Norm))
def test_fab_gives_up_what_lies_beyond_the_radius_and_nothing_else(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hyperplane is reached in the first steps; the radius is that of the middle one of the distances."""
    problem = a_hyperplane(9)
    scale = ThreatModel(norm, 1.0, "pixels", clip=False).pixel_scale(RGB)
    distances = problem.distance(norm, scale)
    threat = ThreatModel(norm, float(distances.median()) * 1.01, "pixels", clip=False)
    asked: list[int] = []
    differentiate = Surrogate.differentiate

    def spy(self: Surrogate, images: Tensor, loss: Loss) -> Slope:
        asked.append(len(images))
        return differentiate(self, images, loss)

    def found(reachable_only: bool) -> MinimumNorm:
        asked.clear()
        return fab_targeted(
            problem.surrogate(), problem.images, problem.labels, threat,
            steps=40, rank=1, generator=torch.Generator(), reachable_only=reachable_only,
        )  # fmt: skip

    monkeypatch.setattr(Surrogate, "differentiate", spy)
    whole = found(reachable_only=False)
    assert asked == [9] * 40
    part = found(reachable_only=True)
    kept = int((distances <= 1.1 * threat.eps).sum())
    assert asked == [9] * 6 + [kept] * 34 and 5 <= kept < 9
    torch.testing.assert_close(part.norms, whole.norms, rtol=1e-3, atol=1e-5)
    assert torch.equal(part.norms <= threat.eps, distances <= threat.eps)
    assert largest_violation(part.attacked, problem.images, threat, RGB) <= rounding(part.attacked.shape, threat, RGB)


def test_fab_gives_up_nothing_that_is_still_coming_nearer() -> None:
    """On a network that is not linear, with a radius between the sizes early in the search and at its end."""
    problem = a_problem(classes=3)
    runs = []
    for reachable_only in (False, True):
        for radius in (0.02, 0.05, 0.1):
            threat = ThreatModel("linf", radius, "pixels", clip=True)
            found = fab_targeted(
                problem.surrogate(), problem.images, problem.labels, threat,
                steps=40, rank=1, generator=torch.Generator(), reachable_only=reachable_only,
            )  # fmt: skip
            runs.append((found.norms <= radius).tolist())
    assert runs[:3] == runs[3:] and any(map(any, runs)) and not all(map(all, runs))


def test_what_is_given_up_is_judged_before() -> None:
    """The graph that counts has its boundary elsewhere: the direction that was found fools it at the full radius."""
    problem = a_hyperplane(6)
    scale = ThreatModel("linf", 1.0, "pixels", clip=False).pixel_scale(RGB)
    threat = ThreatModel("linf", float(problem.distance("linf", scale).min()) / 2, "pixels", clip=False)
    judged: list[int] = []

    def settle(attacked: Tensor, positions: Tensor) -> Tensor:
        assert (attacked - problem.images[positions]).abs().amax() > 0.99 * threat.eps
        judged.extend(positions.tolist())
        return positions % 2 == 0

    fab_targeted(
        problem.surrogate(), problem.images, problem.labels, threat,
        steps=40, rank=1, generator=torch.Generator(), reachable_only=True, settle=settle,
    )  # fmt: skip
    assert set(judged) == set(range(6))


def test_restarts_of_fab_find_nothing_further_away() -> None:
    problem, threat = a_problem(), ThreatModel("l2", 0.5, "pixels", clip=True)
    norms = [
        fab_targeted(
            problem.surrogate(),
            problem.images,
            problem.labels,
            threat,
            steps=8,
            rank=1,
            generator=torch.Generator().manual_seed(0),
            restarts=restarts,
        ).norms
        for restarts in (1, 4)
    ]
    assert bool((norms[1] <= norms[0]).all())


@pytest.mark.parametrize(("space", "clip"), [("pixels", True), ("normalised", False)])
def test_carlini_wagner_comes_near_the_hyperplane(space: Space, clip: bool) -> None:
    """Adam's steps are of one size whatever the distance, so single images may end a good deal beyond it."""
    plane, threat = a_hyperplane(12), ThreatModel("l2", 1.0, space, clip)
    result = carlini_wagner(
        plane.surrogate(), plane.images, plane.labels, threat, steps=150, searches=7, step_size=0.01
    )
    excess = result.norms.cpu() / plane.distance("l2", threat.pixel_scale(RGB))
    assert bool((excess >= 1 - 1e-4).all()) and float(excess.median()) < 1.05


def test_the_carlini_wagner_constant_is_raised_until_it_suffices() -> None:
    plane = a_hyperplane()
    threat = ThreatModel("l2", 1.0, "pixels", clip=True)
    weak, strong = (
        carlini_wagner(
            plane.surrogate(), plane.images, plane.labels, threat, steps=30, searches=searches, step_size=0.001
        )
        for searches in (1, 6)
    )
    missed = ~weak.found.cpu()
    assert bool(missed.any()), "under the first constant the norm holds most images on their side"
    assert bool(weak.norms.cpu()[missed].isinf().all())
    assert torch.equal(weak.closest.cpu()[missed], plane.images[missed])
    assert int(strong.found.sum()) > int(weak.found.sum())


def test_fmn_finds_points_where_many_pixels_are_at_their_bounds() -> None:
    """As published, a ball that is never left because of clipping stays too small for ever."""
    problem, threat = a_problem(20, seed=1), ThreatModel("l2", 0.5, "pixels", clip=True)
    images = problem.images.round()
    labels = problem.model.predict(images).argmax(dim=1)
    result = fmn(problem.surrogate(), images, labels, threat, steps=60)
    assert bool(result.found.all())
    reference = fab_targeted(problem.surrogate(), images, labels, threat, steps=60, rank=1, generator=torch.Generator())
    assert float((result.norms / reference.norms).median()) < 1.05


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_carlini_wagner_is_for_l2_alone(norm: Norm) -> None:
    plane = a_hyperplane(1)
    with pytest.raises(ToolkitError, match=f"the Carlini-Wagner attack is not defined for {norm}") as caught:
        carlini_wagner(plane.surrogate(), plane.images, plane.labels, ThreatModel(norm, 1.0, "pixels", True), steps=1)
    assert caught.value.found == f"--norm {norm}" and "--norm l2" in caught.value.fix


def test_deepfool_has_no_l1_form() -> None:
    plane = a_hyperplane(1)
    with pytest.raises(ToolkitError, match="DeepFool is not defined for l1") as caught:
        deepfool(plane.surrogate(), plane.images, plane.labels, ThreatModel("l1", 1.0, "pixels", True))
    assert "--norm linf or l2" in caught.value.fix
