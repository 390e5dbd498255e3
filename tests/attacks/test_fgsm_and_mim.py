"""FGSM and the momentum iterative method, against closed forms and a loop over single images."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.attacks.problems import Judge, Problem, a_hyperplane, a_problem
from tests.toys import RGB
from toolkit.attacks.fgsm import fgsm
from toolkit.attacks.mim import mim
from toolkit.attacks.pgd import pgd
from toolkit.attacks.threat import PgdPlan, ThreatModel

Norm = Literal["linf", "l2", "l1"]


def gradient(problem: Problem, image: Tensor, label: Tensor) -> Tensor:
    leaf = image[None].clone().requires_grad_(True)
    loss = functional.cross_entropy(problem.model.module(leaf), label[None])
    return torch.autograd.grad(loss, leaf)[0][0]


def test_fgsm_moves_every_pixel_by_the_radius_along_the_sign() -> None:
    problem = a_problem()
    threat = ThreatModel("linf", 0.05, "pixels", clip=True)
    attacked = fgsm(problem.surrogate(), problem.images, problem.labels, threat)
    signs = torch.stack([gradient(problem, x, y).sign() for x, y in zip(problem.images, problem.labels, strict=True)])
    assert torch.allclose(attacked.cpu(), (problem.images + 0.05 * signs).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("space", ["pixels", "normalised"])
def test_fgsm_is_the_optimum_of_a_linear_network(norm: Norm, space: Literal["pixels", "normalised"]) -> None:
    plane, threat = a_hyperplane(), ThreatModel(norm, 0.1, space, clip=False)
    scale = threat.pixel_scale(RGB)
    attacked = fgsm(plane.surrogate(), plane.images, plane.labels, threat).cpu()
    gain = (plane.weight * (attacked - plane.images)).flatten(1).sum(dim=1)
    dual = {"linf": 1, "l2": 2, "l1": torch.inf}[norm]
    most = 0.1 * (plane.weight * scale).flatten(1).norm(p=dual, dim=1)
    # 48 entries, of which a step in l1 moves one
    assert torch.allclose(gain, most, rtol=1e-4)


def test_the_judge_sees_the_one_step_of_fgsm() -> None:
    problem, judge = a_problem(), Judge(set())
    threat = ThreatModel("linf", 0.05, "pixels", clip=True)
    attacked = fgsm(problem.surrogate(), problem.images, problem.labels, threat, settle=judge)
    assert all(torch.equal(seen[0], attacked[position]) for position, seen in judge.seen.items())
    assert set(judge.seen) == set(range(len(problem.labels)))


def momentum_loop(problem: Problem, image: Tensor, label: Tensor, eps: float, steps: int) -> Tensor:
    """The published loop, for one image in l-inf."""
    momentum, current = torch.zeros_like(image), image.clone()
    for _ in range(steps):
        slope = gradient(problem, current, label)
        momentum = momentum + slope / slope.abs().sum()
        current = current + eps / steps * momentum.sign()
        current = (image + (current - image).clamp(-eps, eps)).clamp(0, 1)
    return current


def test_mim_is_the_published_loop_image_by_image() -> None:
    problem = a_problem()
    threat = ThreatModel("linf", 0.1, "pixels", clip=True)
    attacked = mim(problem.surrogate(), problem.images, problem.labels, threat, steps=6).cpu()
    for index, (image, label) in enumerate(zip(problem.images, problem.labels, strict=True)):
        expected = momentum_loop(problem, image, label, 0.1, 6)
        # a sign near zero may turn on rounding
        assert float(((attacked[index] - expected).abs() > 1e-5).float().mean()) <= 0.02


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_under_a_constant_gradient_mim_is_pgd(norm: Norm) -> None:
    plane, threat = a_hyperplane(), ThreatModel(norm, 0.1, "normalised", clip=False)
    plan = PgdPlan("pixel", threat, 5, 0.01, random_start=False)
    expected = pgd(plane.surrogate(), plane.images, plane.labels, plan)
    found = mim(plane.surrogate(), plane.images, plane.labels, threat, steps=5, step_size=0.01)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_steps_of_mim_together_reach_the_radius(norm: Norm) -> None:
    plane, threat = a_hyperplane(), ThreatModel(norm, 0.1, "pixels", clip=False)
    attacked = mim(plane.surrogate(), plane.images, plane.labels, threat, steps=7).cpu()
    expected = fgsm(plane.surrogate(), plane.images, plane.labels, threat).cpu()
    assert torch.allclose(attacked, expected, atol=1e-5)
