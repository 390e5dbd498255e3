from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.evaluators.greys import (
    EPS,
    Countdown,
    a_plan,
    above,
    conditions,
    flat_images,
    noise_images,
    random_model,
    threshold,
)
from tests.toys import linear_model
from toolkit import progress
from toolkit.artifacts import Normalization, Predictor, Proportion, Split, TorchModel
from toolkit.attacks.ensemble import Pass
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.data.images import ArrayImages
from toolkit.evaluators import evaluation, robustness, transfer, worst_case
from toolkit.evaluators.evaluation import Clock, Conditions
from toolkit.evaluators.image_files import Gallery
from toolkit.evaluators.journal import Journal
from toolkit.evaluators.robustness import Robustness, evaluate_robustness
from toolkit.evaluators.scoring import SurrogateName, TargetName
from toolkit.statistics import Mcnemar

pytestmark = pytest.mark.usefixtures("quiet")


def evaluate(
    targets: Mapping[TargetName, Predictor], split: Split, how: Conditions | None = None, **others: Any
) -> Robustness:
    return evaluate_robustness({"float": threshold()}, targets, split, how or conditions(), **others)


def test_a_threshold_is_robust_exactly_outside_the_ball() -> None:
    """Grey values within eps = 25.5/255 of the threshold fall, the others stand: the closed form."""
    values = [0, 60, 101, 103, 120, 135, 152, 154, 200, 255]
    found = evaluate({"torch": threshold()}, flat_images(values))
    expected = sum(abs(value / 255 - 0.5) > EPS for value in values)
    assert found.clean == {"torch": Proportion(10, 10)}
    assert found.worst_case == {"torch": Proportion(expected, 10)}
    assert found.file == Proportion(sum(abs(value - 127.5) > 25 for value in values), 10), "25 whole levels"
    assert found.transfers[0].robust == Proportion(expected, 10)
    assert found.transfers[0].transfer_rate == Proportion(10 - expected, 10 - expected)
    assert (found.passes, found.not_run, found.clean_test, found.best_surrogate) == ((), (), None, "float")


def test_clean_images_are_compared_too() -> None:
    """fp32 is right on 0.31, 0.57 and 0.69, the deployed graph on 0.31 alone."""
    targets: dict[TargetName, Predictor] = {"fp32": above(0.40), "deployed": above(0.70)}
    found = evaluate(targets, flat_images([79, 110, 145, 176]))
    assert found.clean == {"fp32": Proportion(3, 4), "deployed": Proportion(2, 4)}
    assert found.clean_test == Mcnemar(2, 1, 1.0)


def test_an_attack_that_cures_an_image_does_not_count_it_as_robust() -> None:
    """The target has its classes the wrong way round beyond 0.6: clean wrong at 0.65, right where the attack ends."""
    target = threshold(0.6, slope=-1.0)
    found = evaluate({"deployed": target}, flat_images([166], labels=[1]))
    assert found.clean["deployed"] == Proportion(0, 1)
    assert found.transfers[0].robust == Proportion(1, 1)
    assert found.worst_case["deployed"] == Proportion(0, 1) and found.file == Proportion(0, 1)


def seeded_evaluation(seed: int) -> Robustness:
    model = random_model()
    passes = (Pass("apgd-ce", 6, everywhere=True), Pass("square", 15))
    how = conditions(a_plan(3, eps=0.05, random_start=True, restarts=2), *passes, seed=seed)
    return evaluate_robustness({"float": model}, {"deployed": model}, noise_images(40, model), how)


def test_the_same_seed_gives_the_same_figures() -> None:
    assert seeded_evaluation(1) == seeded_evaluation(1)


def test_later_attacks_never_raise_the_worst_case() -> None:
    model = random_model()
    split = noise_images(40, model)
    chain = (Pass("square", 10), Pass("apgd-ce", 2), Pass("apgd-ce", 12), Pass("square", 40))
    rights = []
    for count in range(len(chain) + 1):
        how = conditions(a_plan(1, eps=0.06, step_size=0.02), *chain[:count])
        rights.append(evaluate_robustness({"float": model}, {"deployed": model}, split, how).worst_case["deployed"])
    assert [right.correct for right in rights] == sorted((right.correct for right in rights), reverse=True)
    assert rights[-1].correct < rights[0].correct


class Cut(Exception):
    """The process ends here."""


class Counter:
    """Counts attacks on chunks, and cuts the run in the middle of the one of the given number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.cut_at: int | None = None
        for module, name in ((transfer, "pgd"), (worst_case, "square")):
            monkeypatch.setattr(module, name, self._wrapped(name, getattr(module, name)))
        run: Callable[..., None] = Pass.run

        def counted(how: Pass, *arguments: Any, **others: Any) -> None:
            *inputs, settle = arguments
            self._count(str(how))
            run(how, *inputs, self._cutting(settle), **others)

        monkeypatch.setattr(Pass, "run", counted)

    def _count(self, name: str) -> None:
        self.calls.append(name)

    def _cutting(self, settle: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """Cuts after the ledger took what was found, which is worse than before."""
        number = len(self.calls)

        def cutting(attacked: Tensor, positions: Tensor) -> Tensor:
            found = settle(attacked, positions)
            if number == self.cut_at:
                raise Cut
            return found

        return cutting

    def _wrapped(self, name: str, attack: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*arguments: Any, **others: Any) -> Tensor:
            self._count(name)
            if "settle" in others:
                others["settle"] = self._cutting(others["settle"])
            found = attack(*arguments, **others)
            if len(self.calls) == self.cut_at:
                raise Cut
            return found

        return wrapped


MODEL = random_model()
PASSES = (Pass("apgd-ce", 4, everywhere=True), Pass("apgd-ce", 7), Pass("square", 5), Pass("square", 8, near=0.2))


def resumable(journal: Journal, clock: Clock | None = None) -> Robustness:
    """Two surrogates, three chunks, two restarts: 12 attacks of the matrix, and passes."""
    surrogates: dict[SurrogateName, TorchModel] = {"float": MODEL, "twin": random_model(5)}
    targets: dict[TargetName, Predictor] = {"torch": MODEL, "fp32": random_model(6), "deployed": MODEL}
    plan = a_plan(2, eps=0.08, step_size=0.01, random_start=True, restarts=2)
    how = conditions(plan, *PASSES, input_range=(0.1, 0.9))
    return evaluate_robustness(surrogates, targets, noise_images(12, MODEL), how, journal=journal, clock=clock)


@pytest.fixture(scope="module")
def uncut() -> tuple[Robustness, list[str]]:
    """The figures of a run that nothing interrupts, and its attacks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "evaluation_batch", lambda _shape: 4)
        counter = Counter(patch)
        progress.set_quiet(True)
        found = resumable(Journal())
        progress.set_quiet(False)
        return found, counter.calls


@pytest.mark.parametrize("share", [0.1, 0.5, 0.7, 1.0])
def test_a_run_that_was_cut_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uncut: tuple[Robustness, list[str]], share: float
) -> None:
    """Equal figures, and at most one attack on one chunk (with its restarts) is made again."""
    monkeypatch.setattr(evaluation, "evaluation_batch", lambda _shape: 4)
    whole, attacks = uncut
    assert attacks.count("pgd") == 12 and len(attacks) > 20 and {"square", "apgd-ce-4", "apgd-ce-7"} <= set(attacks)

    counter = Counter(monkeypatch)
    counter.cut_at = max(1, round(share * len(attacks)))
    first = Journal(tmp_path / "run.sqlite", "run")
    with pytest.raises(Cut):
        resumable(first)
    first.close()
    done = counter.calls
    counter.calls, counter.cut_at = [], None
    second = Journal(tmp_path / "run.sqlite", "run", resume=True)
    found = resumable(second)
    second.close()
    assert found == whole
    repeated = len(done) + len(counter.calls) - len(attacks)
    assert 1 <= repeated <= (2 if done[-1] == "pgd" else 1)
    assert attacks[len(attacks) - len(counter.calls) :] == counter.calls


def test_a_finished_journal_repeats_no_attack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counter = Counter(monkeypatch)
    journal = Journal(tmp_path / "run.sqlite", "run")
    whole = resumable(journal)
    counter.calls = []
    assert resumable(journal) == whole and not counter.calls
    journal.close()


@pytest.mark.parametrize("left", [0, 4, 7, 9])
def test_a_budget_that_is_spent_lists_the_rest_and_can_be_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uncut: tuple[Robustness, list[str]], left: int
) -> None:
    """What ran is right (no attack makes a figure better), and with more time the figures are those of a whole run."""
    monkeypatch.setattr(evaluation, "evaluation_batch", lambda _shape: 4)
    whole, _ = uncut
    journal = Journal(tmp_path / "run.sqlite", "run")
    part = resumable(journal, Countdown(left))
    journal.close()
    assert part.not_run and part.clean == whole.clean and part.clean_test == whole.clean_test
    finished = {cell.surrogate for cell in part.transfers}
    assert part.transfers == tuple(cell for cell in whole.transfers if cell.surrogate in finished)
    assert part.columns == tuple(cell for cell in whole.columns if cell.surrogate in finished)
    assert [name for name in part.not_run if name.startswith("pgd")] == [
        f"pgd-2 on {name}" for name in ("float", "twin") if name not in finished
    ]
    for name, share in whole.worst_case.items():
        assert share.correct <= part.worst_case[name].correct <= part.clean[name].correct
    if left == 0:
        assert part.worst_case == {name: part.clean[name] for name in ("fp32", "deployed")}
        assert part.clipped_share is None and not part.passes
    journal = Journal(tmp_path / "run.sqlite", "run", resume=True)
    assert resumable(journal) == whole
    journal.close()


def test_a_clock_expires() -> None:
    assert Clock(0).expired and not Clock(3600).expired and not Clock().expired


def test_square_alone_judges_where_there_is_no_surrogate() -> None:
    how = conditions(a_plan(), Pass("apgd-ce", 5), Pass("square", 10), input_range=(0.0, 1.0))
    found = evaluate_robustness({}, {"deployed": above(0.5)}, flat_images([10, 133, 250]), how)
    assert (found.transfers, found.columns, found.best_surrogate, found.clipped_share) == ((), (), None, None)
    assert [record.attack for record in found.passes] == ["square"]
    assert found.worst_case["deployed"] == Proportion(3 - found.passes[0].fooled, 3)


def test_images_are_kept_that_an_attack_made_wrong(tmp_path: Path) -> None:
    """The first is wrong without it, the last stands: what is kept is what separates the clean from the worst case."""
    split = flat_images([100, 120, 135, 250], labels=[1, 0, 1, 1])
    how = conditions(a_plan(), Pass("apgd-ce", 3), Pass("square", 4))
    found = evaluate({"deployed": threshold()}, split, how, gallery=Gallery(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001-class0.png", "000002-class1.png"]
    assert found.file == Proportion(1, 4) and found.clean["deployed"] == Proportion(3, 4)


def test_gradients_of_surrogates_that_round_keep_float_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 the weights of the float network are cast, those of rounding networks are not."""
    asked: list[str] = []

    class Spy(Surrogate):
        def __init__(self, module: Any, normalization: Any, precision: Any, **options: Any) -> None:
            super().__init__(module, normalization, precision, **options)
            asked.append(precision)

    monkeypatch.setattr(robustness, "Surrogate", Spy)
    names: tuple[SurrogateName, ...] = ("original", "float", "fake_quantised", "twin")
    precisions: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    for precision in precisions:
        robustness.arm(dict.fromkeys(names, threshold()), replace(conditions(), precision=precision))
    assert asked == ["float32"] * 4 + ["bfloat16", "bfloat16", "autocast", "autocast"]


@pytest.mark.parametrize(
    ("norm", "std", "eps", "side", "space"),
    [
        ("linf", 1 / 255, 8.0, 32, "normalised"),  # a network that takes pixels from 0 to 255
        ("linf", 1 / 255, 100.0, 32, "normalised"),
        ("l2", 1 / 255, 300.0, 32, "normalised"),
        ("l2", 0.25, 100.0, 64, "normalised"),
        ("l2", 0.25, 100.0, 64, "pixels"),
        ("l1", 0.25, 900.0, 64, "normalised"),
    ],
)
def test_rounding_in_other_units_is_no_defect(
    norm: Literal["linf", "l2", "l1"], std: float, eps: float, side: int, space: Literal["pixels", "normalised"]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 3, side, side), dtype=np.uint8)
    split = Split(ArrayImages("noise", ("a", "b"), pixels, np.arange(8) % 2), np.arange(8, dtype=np.int64))
    weight = 1e-4 * torch.randn(2, 3 * side * side, generator=torch.Generator().manual_seed(0))
    normalization = Normalization((0.5,) * 3, (std,) * 3)
    model = linear_model(weight, (3, side, side), normalization)
    plan = PgdPlan("paper", ThreatModel(norm, eps, space, clip=False), 2, eps, random_start=True)
    how = replace(conditions(plan), normalization=normalization)
    found = evaluate_robustness({"float": model}, {"torch": model}, split, how)
    assert found.worst_case["torch"].correct == 0 or norm == "l1"


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    model = threshold()
    before = [parameter.clone() for parameter in model.module.parameters()]
    flags = [parameter.requires_grad for parameter in model.module.parameters()]
    how = conditions(a_plan(), Pass("apgd-ce", 3), Pass("square", 3))
    evaluate_robustness({"float": model}, {"torch": model}, flat_images([10, 120]), how, gallery=Gallery(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(before, model.module.parameters(), strict=True))
    assert [parameter.requires_grad for parameter in model.module.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["000001-class0.png"]
