from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.evaluators.greys import (
    EPS,
    By,
    Countdown,
    a_plan,
    above,
    an_evaluation,
    conditions,
    flat_images,
    noise_images,
    random_model,
    threshold,
)
from toolkit.artifacts import Predictor, Proportion, Split, TorchModel, derive_seed
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import PgdPlan
from toolkit.evaluators import evaluation, transfer
from toolkit.evaluators.evaluation import Clock, Conditions, Evaluation
from toolkit.evaluators.robustness import arm
from toolkit.evaluators.scoring import FILE, SurrogateName, TargetName
from toolkit.evaluators.transfer import Matrix, transfer_matrix
from toolkit.statistics import Mcnemar

pytestmark = pytest.mark.usefixtures("quiet")


def matrix(
    surrogates: Mapping[SurrogateName, TorchModel],
    targets: Mapping[TargetName, Predictor],
    split: Split,
    how: Conditions | None = None,
    clock: Clock | None = None,
) -> tuple[Matrix, Evaluation]:
    run = an_evaluation(targets, split, how, clock=clock)
    return transfer_matrix(surrogates, arm(surrogates, run.conditions), run), run


def test_all_figures_by_their_definitions() -> None:
    """Four images, counted by hand. The surrogate's threshold is 0.5, so the attack moves every image by 0.1 to it.

    value        0.31   0.43   0.57   0.69     surrogate: clean right on all, fooled on the middle two
    attacked     0.41   0.53   0.47   0.59
    """
    targets: dict[TargetName, Predictor] = {
        "deployed": above(0.40),  # wrong on the second image from the start; fooled by the first
        "torch": above(0.5),
        "fp32": above(0.45),  # fooled only by the second image
    }
    found, run = matrix({"float": threshold()}, targets, flat_images([79, 110, 145, 176]))
    cells = {cell.target: cell for cell in found.transfers}
    assert list(cells) == ["torch", "fp32", "deployed"], "in the order of the report, whatever that of the targets"
    assert all((cell.attack, cell.surrogate) == ("pgd-5", "float") for cell in found.transfers)
    assert cells["torch"].robust == Proportion(2, 4) and cells["torch"].transfer_rate == Proportion(2, 2)
    assert cells["fp32"].robust == Proportion(3, 4)
    assert cells["fp32"].transfer_rate == Proportion(1, 2), "of the two fooled on the surrogate, one fools the target"
    assert cells["deployed"].robust == Proportion(2, 4)
    assert cells["deployed"].transfer_rate == Proportion(0, 1), "the image that it gets wrong clean is not eligible"
    assert [(column.first, column.second) for column in found.columns] == [("torch", "fp32"), ("fp32", "deployed")]
    assert found.columns[0].test == Mcnemar(0, 1, 1.0)  # torch right on 0, 3; fp32 on 0, 2, 3
    assert found.columns[1].test == Mcnemar(1, 0, 1.0)  # deployed right on 2, 3: at 0.41 and 0.53 it says bright
    assert run.ledger.worst["deployed"].tolist() == [False, False, True, True]
    assert run.ledger.worst["fp32"].tolist() == [True, False, True, True]
    assert (found.not_run, found.clipped_share) == ((), None)
    assert found.best == {"fp32": ("float",), "deployed": ("float",)}


@pytest.mark.parametrize(("only_first", "only_second", "p_value"), [(5, 0, 0.0625), (3, 1, 0.625), (0, 6, 0.03125)])
def test_columns_are_compared_image_by_image(only_first: int, only_second: int, p_value: float) -> None:
    """Dark images, attacked to 0.3 and 0.7: exactly one graph is right on those that one of them calls bright there."""
    values = [51] * only_first + [153] * only_second + [0] * 7
    split = flat_images(values, labels=[0] * len(values))
    targets: dict[TargetName, Predictor] = {
        "deployed": By(lambda mean: (mean > 0.25) & (mean < 0.35)),  # wrong where 51 is moved to
        "fp32": By(lambda mean: mean > 0.65),  # wrong where 153 is
    }
    found, _ = matrix({"float": threshold(0.95)}, targets, split)
    (column,) = found.columns
    assert column.test == Mcnemar(only_first, only_second, p_value)


def test_no_transfer_rate_where_the_surrogate_is_never_fooled() -> None:
    found, run = matrix({"float": threshold()}, {"deployed": above(0.5)}, flat_images([0, 255]))
    assert found.transfers[0].transfer_rate is None
    assert run.ledger.worst["deployed"].all()


def test_images_that_fool_the_surrogate_clean_are_not_eligible() -> None:
    found, _ = matrix({"float": threshold()}, {"deployed": above(0.4)}, flat_images([110, 145], labels=[1, 1]))
    assert found.transfers[0].transfer_rate == Proportion(0, 1)


def test_a_fooled_surrogate_does_not_end_the_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step is made on images that the first one settled: only 0.38, two steps away, fools the target."""
    asked: list[int] = []
    gradient = Surrogate.gradient

    def spy(self: Surrogate, images: Tensor, labels: Tensor) -> Tensor:
        asked.append(len(images))
        return gradient(self, images, labels)

    monkeypatch.setattr(Surrogate, "gradient", spy)
    how = conditions(a_plan(4, eps=0.2, step_size=0.05))
    found, _ = matrix({"float": threshold()}, {"deployed": above(0.4)}, flat_images([135, 140, 145]), how)
    assert asked == [3, 3, 3, 3], "all steps on all images, though the first fools the surrogate"
    assert found.transfers[0].robust == Proportion(0, 3)


def test_every_surrogate_is_scored_on_every_target() -> None:
    surrogates: dict[SurrogateName, TorchModel] = {
        "original": threshold(),
        "float": threshold(0.4),
        "twin": threshold(),
    }
    names: tuple[TargetName, ...] = ("torch", "fp32", "deployed", "deployed_unoptimised")
    split = flat_images(list(range(0, 256, 15)))
    targets = {name: above(0.5) for name in names}
    found, run = matrix(surrogates, targets, split)
    assert [(cell.surrogate, cell.target) for cell in found.transfers] == [(s, t) for s in surrogates for t in names]
    assert all(cell.robust.total == len(split) for cell in found.transfers)
    assert len(found.columns) == 9
    for target in targets.values():
        assert target.calls.count(len(split)) == 4, "clean and one attack per surrogate"
    single = [matrix({name: model}, {"deployed": above(0.5)}, split)[1] for name, model in surrogates.items()]
    lowest = torch.stack([one.ledger.worst["deployed"] for one in single]).all(dim=0)
    assert torch.equal(run.ledger.worst["deployed"], lowest)


def test_the_best_surrogate_is_the_one_that_fools_the_graph_that_counts_most() -> None:
    """The first surrogate has its classes the wrong way round: attacks on it only make the images easier."""
    wrong = threshold(slope=-1.0)
    surrogates: dict[SurrogateName, TorchModel] = {"original": wrong, "float": threshold(), "twin": wrong}
    split = flat_images([110, 115, 140, 145] * 3, labels=[0, 0, 1, 1] * 3)
    found, _ = matrix(surrogates, {"deployed": above(0.5), "torch": By(lambda mean: mean > 0.9)}, split)
    right = {cell.surrogate: cell.robust.correct for cell in found.transfers if cell.target == "deployed"}
    assert right == {"original": 12, "float": 0, "twin": 12}
    assert found.best == {"deployed": ("float", "twin")}, "its own form too, however weak"


def test_every_compared_graph_has_a_best_surrogate_of_its_own() -> None:
    """The graphs have their classes the other way round; so have their surrogates."""
    surrogates: dict[SurrogateName, TorchModel] = {"float": threshold(), "twin": threshold(slope=-1.0)}
    targets: dict[TargetName, Predictor] = {"fp32": threshold(), "deployed": threshold(slope=-1.0)}
    # beyond 0.6 both graphs stand, below 0.4 too: what is right on the one is wrong on the other from the start
    found, _ = matrix(surrogates, targets, flat_images([140, 140, 145], labels=[1, 0, 0]))
    assert found.best == {"fp32": ("float",), "deployed": ("twin",)}


def test_of_several_restarts_the_worst_counts_for_every_judge_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first restart reaches one threshold, the second the other: each judge is fooled in its own."""
    ends = iter([0.47, 0.63])
    monkeypatch.setattr(transfer, "pgd", lambda _s, images, *_rest: torch.full_like(images, next(ends)))
    targets: dict[TargetName, Predictor] = {"fp32": above(0.5), "deployed": By(lambda mean: mean < 0.6)}
    how = conditions(a_plan(restarts=2, random_start=True))
    split = flat_images([140], labels=[1])
    found, run = matrix({"float": threshold(0.5)}, targets, split, how)
    assert [cell.robust.correct for cell in found.transfers] == [0, 0]
    assert [cell.transfer_rate for cell in found.transfers] == [Proportion(1, 1)] * 2, "fooled in the first restart"
    assert not any(flags.any() for flags in run.ledger.worst.values())


def test_more_restarts_never_raise_the_figure_and_repeat_with_the_seed() -> None:
    model = random_model()
    split = noise_images(64, model)

    def robust(restarts: int, seed: int = 0) -> int:
        how = conditions(a_plan(1, restarts=restarts, random_start=True), seed=seed)
        found, _ = matrix({"float": model}, {"torch": model}, split, how)
        return found.transfers[0].robust.correct

    one, four = robust(1), robust(4)
    assert four <= one and robust(4) == four and robust(1) == one


def test_every_restart_has_a_start_of_its_own_whatever_ran_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random start depends on seed, surrogate, chunk and restart alone: not on the number of earlier restarts."""
    split = flat_images([90, 110, 118, 133, 140, 160])
    monkeypatch.setattr(evaluation, "evaluation_batch", lambda _shape: 3)
    surrogates: dict[SurrogateName, TorchModel] = {"original": threshold(), "float": threshold()}

    def starts(restarts: int, seed: int = 0) -> dict[tuple[int, int], Tensor]:
        found: list[Tensor] = []

        def spy(surrogate: Any, images: Tensor, labels: Tensor, how: PgdPlan, generator: torch.Generator) -> Tensor:
            found.append(torch.rand(4, generator=generator.clone_state()))
            return pgd(surrogate, images, labels, how, generator)

        monkeypatch.setattr(transfer, "pgd", spy)
        how = conditions(a_plan(2, restarts=restarts, random_start=True), seed=seed)
        matrix(surrogates, {"torch": threshold()}, split, how)
        return {divmod(number, restarts): start for number, start in enumerate(found)}

    one, three = starts(1), starts(3)
    assert len(one) == 4 and len(three) == 12
    assert all(torch.equal(start, three[cell, restart]) for (cell, restart), start in one.items())
    assert len({tuple(start.tolist()) for start in three.values()}) == 12
    assert not torch.equal(starts(1, seed=1)[0, 0], one[0, 0])
    assert derive_seed(0, 0, 1, 0) != derive_seed(0, 1, 0, 0)


def test_without_a_random_start_the_figures_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    split = flat_images([90, 110, 118, 133, 140, 160])
    whole, _ = matrix({"float": threshold()}, {"torch": threshold()}, split)
    monkeypatch.setattr(evaluation, "evaluation_batch", lambda _shape: 4)
    cut, _ = matrix({"float": threshold()}, {"torch": threshold()}, split)
    assert whole == cut


def test_the_clipped_share_is_that_of_the_pixels_outside() -> None:
    """Without clipping, images at 0 and 1 with wrong labels are attacked outwards, images at the middle never leave."""
    wrong = flat_images([0, 255, 120, 130], labels=[1, 0, 0, 1])

    def clipped(low: float, high: float, restarts: int = 1) -> float | None:
        plan = a_plan(clip=False, restarts=restarts, random_start=restarts > 1)
        how = conditions(plan, input_range=(low, high))
        return matrix({"float": threshold()}, {"deployed": above(0.5)}, wrong, how)[0].clipped_share

    assert clipped(0.0, 1.0) == pytest.approx(0.5)
    assert clipped(0.0, 1.0, restarts=3) == pytest.approx(0.5)
    assert clipped(-0.05, 1.2) == pytest.approx(0.25)
    assert clipped(-0.2, 1.2) == 0


def test_an_attack_that_leaves_its_ball_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "pgd", lambda _s, images, *_rest: (images + 2 * EPS).clamp(0, 1))
    with pytest.raises(RuntimeError, match="left its threat model"):
        matrix({"float": threshold()}, {"deployed": above(0.5)}, flat_images([10, 200]))


@pytest.mark.parametrize("left", range(5))
def test_what_the_time_does_not_suffice_for_is_listed(monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    """Two surrogates, two chunks each: a row counts only when it is whole, but its evidence is not lost."""
    monkeypatch.setattr(evaluation, "evaluation_batch", lambda _shape: 2)
    surrogates: dict[SurrogateName, TorchModel] = {"float": threshold(), "twin": threshold()}
    split = flat_images([120, 120, 135, 250])
    found, run = matrix(surrogates, {"deployed": above(0.5)}, split, clock=Countdown(left))
    assert found.not_run == ("pgd-5 on float", "pgd-5 on twin")[left // 2 :]
    assert [cell.surrogate for cell in found.transfers] == ["float", "twin"][: left // 2]
    assert all(cell.robust == Proportion(1, 4) for cell in found.transfers)
    first: tuple[SurrogateName, ...] = ("float",) if left < 4 else ("float", "twin")  # equal, so both
    assert found.best == ({} if left < 2 else {"deployed": first})
    standing = {0: [True] * 4, 1: [False, False, True, True]}.get(left, [False, False, False, True])
    assert run.ledger.worst["deployed"].tolist() == run.ledger.worst[FILE].tolist() == standing


def test_no_surrogates_no_cells() -> None:
    found, _ = matrix({}, {"deployed": above(0.5)}, flat_images([10, 200]), conditions(input_range=(0.0, 1.0)))
    assert found == Matrix((), (), None, {}, ("pgd-5: there is no network to make it on",))
