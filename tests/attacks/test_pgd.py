from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from tests.toys import GREY, RGB, linear_model, small_network, wrap
from toolkit.artifacts import Normalization, TorchModel
from toolkit.attacks.pgd import constrain, largest_violation, pgd, rounding
from toolkit.attacks.projections import START
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import PRESETS, PgdPlan, ThreatModel

Norm = Literal["linf", "l2", "l1"]


def a_plan(
    threat: ThreatModel, *, steps: int = 1, step_size: float | None = None, random_start: bool = False
) -> PgdPlan:
    return PgdPlan("pixel", threat, steps, step_size or 2 * threat.eps, random_start)


def attack(model: TorchModel, images: Tensor, labels: Tensor, plan: PgdPlan, seed: int = 0) -> Tensor:
    surrogate = Surrogate(model.module, model.spec.normalization)
    return pgd(surrogate, images, labels, plan, torch.Generator().manual_seed(seed)).cpu()


def a_linear_problem() -> tuple[TorchModel, Tensor, Tensor, Tensor]:
    """Two classes; the loss rises along `direction`, the difference of the classes' weights behind normalisation."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3 * 4 * 4, generator=generator)
    model = linear_model(weight, (3, 4, 4), RGB)
    images = torch.rand(6, 3, 4, 4, generator=generator) * 0.4 + 0.3
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    sign = torch.where(labels == 0, 1.0, -1.0).view(-1, 1, 1, 1)
    direction = sign * (weight[1] - weight[0]).view(1, 3, 4, 4) / torch.tensor(RGB.std).view(1, 3, 1, 1)
    return model, images, labels, direction


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("space", ["pixels", "normalised"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_linear_network_the_attack_finds_the_optimum(
    norm: Norm, space: Literal["pixels", "normalised"], steps: int
) -> None:
    model, images, labels, direction = a_linear_problem()
    eps = 0.1
    scale = torch.ones(1, 3, 1, 1) if space == "pixels" else torch.tensor(RGB.std).view(1, 3, 1, 1)
    along = direction * scale  # the gradient in the units of the ball
    best = along.sign() if norm == "linf" else along / along.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    plan = a_plan(ThreatModel(norm, eps, space, clip=False), steps=steps, step_size=2 * eps / steps)
    attacked = attack(model, images, labels, plan)
    assert torch.allclose(attacked, images + scale * eps * best, atol=1e-6)


@pytest.mark.parametrize("space", ["pixels", "normalised"])
def test_in_l1_the_attack_puts_all_of_the_radius_where_the_gradient_is_largest(
    space: Literal["pixels", "normalised"],
) -> None:
    model, images, labels, direction = a_linear_problem()
    threat = ThreatModel("l1", 0.2, space, clip=False)
    scale = threat.pixel_scale(RGB)
    attacked = attack(model, images, labels, a_plan(threat, steps=3, step_size=0.2))
    delta = ((attacked - images) / scale).flatten(1)
    along = (direction * scale).expand_as(images).flatten(1)
    top = along.abs().argmax(dim=1, keepdim=True)
    assert torch.allclose(delta.gather(1, top), 0.2 * along.gather(1, top).sign(), atol=1e-6)
    assert torch.allclose(delta.abs().sum(dim=1), torch.full((6,), 0.2), atol=1e-5)


def test_in_l1_the_attack_goes_on_where_pixels_are_at_their_bounds() -> None:
    """The optimum of a linear function fills one pixel after another, those of the steepest gradient first."""
    model, images, labels, direction = a_linear_problem()
    threat = ThreatModel("l1", 3.0, "pixels", clip=True)
    attacked = attack(model, images, labels, a_plan(threat, steps=40, step_size=1.0))
    gain = ((attacked - images) * direction).flatten(1).sum(dim=1)
    along = direction.expand_as(images).flatten(1)
    room = torch.where(along > 0, 1 - images.flatten(1), images.flatten(1))
    order = along.abs().argsort(dim=1, descending=True)
    rooms = room.gather(1, order)
    filled = torch.minimum(rooms, (3.0 - rooms.cumsum(dim=1) + rooms).clamp_min(0))
    best = (along.abs().gather(1, order) * filled).sum(dim=1)
    assert bool((gain <= best * (1 + 1e-5)).all()) and bool((gain >= 0.97 * best).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_that_do_not_reach_the_boundary_add_up(norm: Norm) -> None:
    model, images, labels, direction = a_linear_problem()
    best = direction.sign() if norm == "linf" else direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    plan = a_plan(ThreatModel(norm, 0.1, "pixels", clip=False), steps=3, step_size=0.01)
    assert torch.allclose(attack(model, images, labels, plan), images + 0.03 * best, atol=1e-6)


def test_under_paper_eps_is_in_normalised_units_and_pixels_leave_the_range() -> None:
    model, _, labels, _ = a_linear_problem()
    images = (torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    plan = PRESETS["paper", "cifar10"]
    attacked = attack(model, images, labels, plan)
    per_channel = (attacked - images).abs().amax(dim=(0, 2, 3))
    assert torch.allclose(per_channel, 8 / 255 * torch.tensor(RGB.std), atol=1e-6)
    assert float(attacked.min()) < 0 and float(attacked.max()) > 1
    assert float(-attacked.min()) <= plan.threat.margin(RGB) + 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["linf", "l2", "l1"]), st.floats(0.01, 2.0), st.integers(1, 4))
def test_under_pixel_attacked_images_never_leave_ball_and_range(seed: int, norm: Norm, eps: float, steps: int) -> None:
    torch.manual_seed(0)
    model = wrap(small_network(), classes=2, shape=(1, 8, 8))
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(5, 1, 8, 8, generator=generator).mul(1.4).sub(0.2).clamp(0, 1)
    labels = torch.randint(0, 2, (5,), generator=generator)
    threat = ThreatModel(norm, eps, "pixels", clip=True)
    attacked = attack(model, images, labels, a_plan(threat, steps=steps, step_size=eps, random_start=True), seed)
    assert float(attacked.min()) >= 0 and float(attacked.max()) <= 1
    assert largest_violation(attacked, images, threat, GREY) <= 1e-5


@given(st.integers(0, 10_000), st.sampled_from(["linf", "l2", "l1"]), st.floats(0.01, 2.0), st.booleans())
def test_constraining_keeps_the_ball_after_clipping_and_is_idempotent(
    seed: int, norm: Norm, eps: float, normalised: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(4, 3, 3, 3, generator=generator).round(decimals=1)
    threat = ThreatModel(norm, eps, "normalised" if normalised else "pixels", clip=True)
    scale = threat.pixel_scale(RGB)
    inside = constrain(images + torch.randn(images.shape, generator=generator), images, threat, scale)
    assert largest_violation(inside, images, threat, RGB) <= 1e-5
    assert torch.allclose(constrain(inside, images, threat, scale), inside, atol=1e-6)


def test_violations_are_measured_in_the_balls_units() -> None:
    images = torch.full((2, 1, 2, 2), 0.5)
    paper = ThreatModel("linf", 0.1, "normalised", clip=False)
    assert largest_violation(images + 0.05, images, paper, GREY) == pytest.approx(0, abs=1e-6)
    assert largest_violation(images + 0.06, images, paper, GREY) == pytest.approx(0.02, abs=1e-6)
    pixel = ThreatModel("l2", 1.0, "pixels", clip=True)
    assert largest_violation(images + 0.5, images, pixel, GREY) == pytest.approx(0, abs=1e-6)
    assert largest_violation(images + 0.6, images, pixel, GREY) == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_random_starts_repeat_with_their_seed_and_need_a_generator(norm: Norm) -> None:
    model, images, labels, _ = a_linear_problem()
    plan = a_plan(ThreatModel(norm, 0.1, "pixels", clip=True), step_size=0.001, random_start=True)
    first, second, other = (attack(model, images, labels, plan, seed) for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    with pytest.raises(ValueError, match="needs a generator"):
        pgd(Surrogate(model.module, RGB), images, labels, plan)


def test_the_random_start_is_the_one_of_the_ball() -> None:
    # a network without gradient: what comes back is the start itself
    model = linear_model(torch.zeros(2, 48), (3, 4, 4), RGB)
    images, labels = torch.full((5, 3, 4, 4), 0.5), torch.zeros(5, dtype=torch.int64)
    plan = a_plan(ThreatModel("linf", 0.1, "normalised", clip=False), random_start=True)
    start = START["linf"](images.shape, 0.1, torch.Generator().manual_seed(3))
    expected = images + start * torch.tensor(RGB.std).view(1, 3, 1, 1)
    assert torch.allclose(attack(model, images, labels, plan, seed=3), expected, atol=1e-7)


def test_the_images_given_are_not_changed() -> None:
    model, images, labels, _ = a_linear_problem()
    before = images.clone()
    attack(model, images, labels, a_plan(ThreatModel("linf", 0.1, "pixels", clip=True), steps=3))
    assert torch.equal(images, before)


def paper_attack(network: nn.Module, image: Tensor, label: Tensor, normalization: Normalization) -> Tensor:
    """The published loop, for one image: the perturbation lives on the normalised image and starts at zero."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (normalization.mean, normalization.std))
    normalised = (image - mean) / std
    delta = torch.zeros_like(normalised, requires_grad=True)
    for _ in range(20):
        loss = nn.CrossEntropyLoss()(network(normalised + delta), label)
        loss.backward()
        assert delta.grad is not None
        delta.data = (delta + 0.01 * delta.grad.detach().sign()).clamp(-0.1, 0.1)
        delta.grad.zero_()
    return ((normalised + delta) * std + mean).detach()


def test_the_attack_is_the_papers_image_by_image() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 10)
    )
    model = wrap(network, shape=(1, 8, 8))
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8)
    ours = attack(model, images, labels, PRESETS["paper", "fashion-mnist"])
    for index in range(len(images)):
        theirs = paper_attack(network, images[index : index + 1], labels[index : index + 1], GREY)
        # the sign of a gradient near zero may turn on rounding: at most a few pixels, and never the loss
        assert float(((ours[index] - theirs[0]).abs() > 1e-5).float().mean()) <= 0.03
        losses = [
            functional.cross_entropy(model.predict(x), labels[index : index + 1])
            for x in (ours[index : index + 1], theirs)
        ]
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-3)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    ("std", "eps", "side", "space", "clip"),
    [
        (1 / 255, 8.0, 8, "normalised", False),  # a network that takes pixels from 0 to 255
        (1 / 255, 0.01, 8, "normalised", False),
        (1 / 255, 8.0, 8, "normalised", True),
        (1 / 255, 100.0, 224, "normalised", False),
        (0.25, 100.0, 224, "pixels", True),
        (0.25, 0.01, 224, "pixels", True),
        (4.0, 0.5, 8, "normalised", False),
    ],
)
def test_rounding_allows_what_float32_does_and_no_more(
    norm: Norm, std: float, eps: float, side: int, space: Literal["pixels", "normalised"], clip: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    normalization = Normalization((0.5,) * 3, (std,) * 3)
    threat = ThreatModel(norm, eps, space, clip)
    images = torch.rand(2, 3, side, side, generator=generator)
    scale = threat.pixel_scale(normalization)
    allowed = rounding(images.shape, threat, normalization)
    far = images + scale * 3 * eps * torch.randn(images.shape, generator=generator)
    for attacked in (constrain(far, images, threat, scale), constrain(images + scale * eps, images, threat, scale)):
        assert largest_violation(attacked, images, threat, normalization) <= allowed
    assert allowed < 0.2 * eps or std == 1 / 255 or norm == "l1", "what is as coarse as the smallest balls there"


def test_one_and_the_same_rounding_stays_strict_for_ordinary_units() -> None:
    threat = PRESETS["pixel", "cifar10"].threat
    assert rounding(torch.Size((4, 3, 32, 32)), threat, RGB) < 1.1e-5
