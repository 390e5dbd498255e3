from __future__ import annotations

from typing import Any, Literal, get_args

import pytest
import torch

from tests.attacks.problems import a_problem
from tests.toys import RGB
from toolkit.attacks import ensemble
from toolkit.attacks.ensemble import (
    COMPOSITIONS,
    ENSEMBLE,
    FAST,
    GRADIENT_ATTACKS,
    PGD,
    SQUARE,
    TARGETS,
    Pass,
    Recipe,
    compose,
)
from toolkit.attacks.losses import margin
from toolkit.attacks.pgd import largest_violation, rounding
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import ThreatModel
from toolkit.errors import ToolkitError

Norm = Literal["linf", "l2", "l1"]
EPS: dict[Norm, float] = {"linf": 0.1, "l2": 1.0, "l1": 8.0}


def test_the_ensemble_holds_all_of_autoattacks_standard() -> None:
    """Croce & Hein 2020: APGD on cross-entropy, targeted APGD and FAB on nine classes, Square with 5000 queries."""
    standard = {("apgd-ce", 100, 0), (SQUARE, 5000, 0)}
    standard |= {(name, 100, rank) for name in ("apgd-t", "fab-t") for rank in range(1, 10)}
    assert standard <= {(how.attack, how.steps, rank) for how in ENSEMBLE for rank in how.ranks or (0,)}
    nearness = [how.near for how in ENSEMBLE if not how.by_queries]
    assert nearness == sorted(nearness) and nearness[0] == 0, "the dearer, the fewer images"


@pytest.mark.parametrize("passes", [ENSEMBLE, FAST])
def test_compositions_end_with_queries_and_begin_with_the_cheapest(passes: tuple[Pass, ...]) -> None:
    kinds = [how.by_queries for how in passes]
    assert kinds == sorted(kinds) and any(kinds)
    steps = [how.steps for how in passes if not how.by_queries]
    assert steps == sorted(steps)
    assert not any(how.near for how in passes[:2]), "something is known of every image before any is left out"


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_targeted_attacks_have_one_target_fewer_than_classes(classes: int) -> None:
    ranks = [rank for how in compose("apgd-t", classes) for rank in how.ranks]
    assert ranks == list(range(1, min(classes - 1, TARGETS) + 1))
    assert all(how.ranks for how in compose("apgd-t", classes))
    for name, passes in COMPOSITIONS.items():
        fitting = compose(name, classes)
        assert all(max(how.ranks, default=0) < classes for how in fitting)
        untargeted = [how for how in passes if not how.ranks]
        assert [how for how in fitting if not how.ranks] == untargeted, "none loses its targets, and aims at any"


def test_names_are_composed_in_their_order_and_pgd_adds_nothing() -> None:
    assert compose(PGD, 10) == ()
    assert compose("fast", 10) == FAST and compose("ensemble", 10) == ENSEMBLE
    assert [how.attack for how in compose("fgsm, square ,apgd-dlr,pgd", 10)] == ["fgsm", "square", "apgd-dlr"]
    assert [str(how) for how in compose("apgd-t", 3)] == ["apgd-t-100 to class 1", "apgd-t-100 to class 2"]
    assert str(compose("apgd-t", 4)[1]) == "apgd-t-100 to class 2, 3"


def test_an_unknown_attack_lists_the_choices() -> None:
    with pytest.raises(ToolkitError, match="unknown attack") as raised:
        compose("fast,apgd-ec", 10)
    assert "did you mean 'apgd-ce'" in raised.value.fix
    assert all(name in raised.value.fix for name in (*COMPOSITIONS, *GRADIENT_ATTACKS, SQUARE))


@pytest.mark.parametrize(("name", "norm"), [("deepfool", "l1"), ("cw", "linf"), ("cw", "l1")])
def test_an_attack_in_a_norm_that_it_does_not_have_is_refused(name: str, norm: Norm) -> None:
    with pytest.raises(ToolkitError, match=f"{name} does not exist in the norm {norm}") as raised:
        compose(name, 10, norm)
    assert raised.value.found == f"--attacks {name} with --norm {norm}"
    assert "apgd-ce" in raised.value.fix and name not in raised.value.fix.split(", or another")[0].split(", ")


@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_every_named_attack_finds_images_within_the_threat_model(name: str, norm: Norm) -> None:
    """In a large ball around small random networks, all of them fool some image, and submit nothing beyond it."""
    if norm not in GRADIENT_ATTACKS[name].norms:
        return
    problem, threat = a_problem(classes=3), ThreatModel(norm, 2 * EPS[norm], "pixels", clip=True)
    fooled = torch.zeros(len(problem.images), dtype=torch.bool)

    def settle(attacked: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        over = largest_violation(attacked, problem.images[positions], threat, RGB)
        assert over <= rounding(attacked.shape, threat, RGB)
        wrong = problem.model.predict(attacked).argmax(dim=1) != problem.labels[positions]
        fooled[positions] |= wrong
        return wrong

    (how, *_) = compose(name, 3, norm)
    short = Pass(how.attack, min(how.steps, 30), how.ranks)
    generator = torch.Generator().manual_seed(0)
    short.run(problem.surrogate(), problem.images, problem.labels, threat, generator, settle)
    assert fooled.sum() >= 2


@pytest.mark.parametrize("norm", get_args(Norm))
def test_an_attack_that_goes_on_begins_where_others_came_to(norm: Norm) -> None:
    """A few short steps from there come further than as many from anywhere; nothing leaves the ball."""
    problem, threat = a_problem(classes=3), ThreatModel(norm, EPS[norm], "pixels", clip=True)
    generator, kept = torch.Generator().manual_seed(0), problem.images.clone()

    def collect(attacked: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        over = largest_violation(attacked, problem.images[positions], threat, RGB)
        assert over <= rounding(attacked.shape, threat, RGB)
        kept[positions] = attacked
        return torch.zeros(len(positions), dtype=torch.bool)

    inputs = (problem.surrogate(), problem.images, problem.labels, threat, generator, collect)
    Pass("apgd-margin", 40).run(*inputs)
    first, start = margin(problem.model.predict(kept), problem.labels), kept.clone()
    Pass("apgd-margin", 3, onward=True).run(*inputs, start=start)
    onward = margin(problem.model.predict(kept), problem.labels)
    Pass("apgd-margin", 3).run(*inputs)
    anywhere = margin(problem.model.predict(kept), problem.labels)
    clean = margin(problem.model.predict(problem.images), problem.labels)
    assert bool((onward > anywhere).float().mean() > 0.6 and onward.sum() > anywhere.sum())
    assert bool((onward - clean).sum() > 0.8 * (first - clean).sum()), "the noise around the start costs little"


@pytest.mark.parametrize("exact", [False, True])
def test_an_exact_pass_computes_in_float32(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, threat = a_problem(classes=3), ThreatModel("linf", 0.1, "pixels", clip=True)
    given: list[Surrogate] = []
    monkeypatch.setattr(ensemble, "GRADIENT_ATTACKS", {"any": Recipe(lambda s, *_, **__: given.append(s), None)})
    surrogate = problem.surrogate("autocast")
    inputs = (surrogate, problem.images, problem.labels, threat, torch.Generator())
    Pass("any", 1, exact=exact).run(*inputs, lambda _, positions: positions < 0)
    assert (given[0] is surrogate) == (not exact)
    given[0].logits(problem.images)
    assert given[0].precision == ("float32" if exact else "autocast")


def test_every_image_is_aimed_at_each_of_the_classes_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack gets copies; who settles sees positions in the batch that was given."""
    problem, threat = a_problem(classes=5), ThreatModel("linf", 0.1, "pixels", clip=True)
    images, labels = problem.images[:3], problem.labels[:3]
    settled: list[int] = []

    def attack(_surrogate: object, copies: torch.Tensor, truth: torch.Tensor, *_: object, **how: Any) -> None:
        assert torch.equal(copies, torch.cat([images, images])) and torch.equal(truth, torch.cat([labels, labels]))
        assert how["rank"].tolist() == [2, 2, 2, 4, 4, 4]
        how["settle"](copies[[1, 4, 5]], torch.tensor([1, 4, 5]))

    def settle(attacked: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert torch.equal(attacked, images[positions])
        settled.extend(positions.tolist())
        return torch.zeros(len(positions), dtype=torch.bool)

    monkeypatch.setattr(ensemble, "GRADIENT_ATTACKS", {"aims": Recipe(attack, 10, targeted=True)})
    Pass("aims", 10, (2, 4)).run(problem.surrogate(), images, labels, threat, torch.Generator(), settle)
    assert settled == [1, 1, 2]


def test_starts_are_made_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attack gets a copy of the images, and of where it begins, for each; who settles sees the given batch."""
    problem, threat = a_problem(classes=5), ThreatModel("linf", 0.1, "pixels", clip=True)
    images, labels, start = problem.images[:2], problem.labels[:2], problem.images[2:4]
    settled: list[int] = []

    def attack(_surrogate: object, copies: torch.Tensor, truth: torch.Tensor, *_: object, **how: Any) -> None:
        assert torch.equal(copies, images.repeat(3, 1, 1, 1)) and torch.equal(truth, labels.repeat(3))
        assert torch.equal(how["start"], start.repeat(3, 1, 1, 1)) and "rank" not in how
        how["settle"](copies[[1, 4]], torch.tensor([1, 4]))

    def settle(attacked: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        assert torch.equal(attacked, images[positions])
        settled.extend(positions.tolist())
        return torch.zeros(len(positions), dtype=torch.bool)

    monkeypatch.setattr(ensemble, "GRADIENT_ATTACKS", {"any": Recipe(attack, 10)})
    how = Pass("any", 10, onward=True, starts=3)
    how.run(problem.surrogate(), images, labels, threat, torch.Generator(), settle, start=start)
    assert settled == [1, 0] and how.copies == 3 and str(how) == "any-10 x 3 from there"
