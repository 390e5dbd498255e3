from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.toys import linear_model
from toolkit import artifacts, progress
from toolkit.artifacts import Int64Array, Normalization, Proportion, Split, TorchModel, UInt8Array
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import PgdPlan, ThreatModel
from toolkit.data.images import ArrayImages
from toolkit.evaluators import robustness
from toolkit.evaluators.robustness import Robustness, TargetName, evaluate_robustness

SIDE = 4
EPS = 0.1


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    progress.set_quiet(True)
    yield
    progress.set_quiet(False)


def flat_images(values: list[int], labels: list[int] | None = None) -> Split:
    """Images of one grey value each; label 1 means brighter than the middle."""
    pixels: UInt8Array = np.repeat(np.array(values, np.uint8), SIDE * SIDE).reshape(-1, 1, SIDE, SIDE)
    truth: Int64Array = np.array(labels if labels is not None else [value > 127 for value in values], np.int64)
    return Split(ArrayImages("flat", ("dark", "bright"), pixels, truth), np.arange(len(values), dtype=np.int64))


def threshold(at: float = 0.5, slope: float = 1.0) -> TorchModel:
    """Bright if the mean pixel is above `at`; PGD on it moves every pixel straight to the threshold."""
    weight = torch.stack([-torch.ones(SIDE * SIDE), torch.ones(SIDE * SIDE)]) * slope / SIDE**2
    return linear_model(weight, (1, SIDE, SIDE), Normalization((at,), (1.0,)))


class By:
    """A predictor whose answer is a function of the mean pixel."""

    def __init__(self, bright: Callable[[Tensor], Tensor]) -> None:
        self.bright = bright

    def predict(self, images: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(self.bright(images.mean(dim=(1, 2, 3))).long(), 2).float()


def plan(steps: int = 5, *, restarts: int = 1, random_start: bool = False, clip: bool = True) -> PgdPlan:
    threat = ThreatModel("linf", EPS, "pixels" if clip else "normalised", clip)
    return PgdPlan("pixel", threat, steps, EPS, random_start, restarts)


def evaluate(targets: dict[TargetName, By | TorchModel], split: Split, how: PgdPlan | None = None) -> Robustness:
    return evaluate_robustness(threshold(), targets, split, how or plan(), seed=3, precision="float32")


def test_a_threshold_is_robust_exactly_outside_the_ball() -> None:
    """Grey values within eps = 25.5/255 of the threshold fall, the others stand: the closed form."""
    values = [0, 60, 101, 103, 120, 135, 152, 154, 200, 255]
    model = threshold()
    found = evaluate_robustness(model, {"torch": model}, flat_images(values), plan(), seed=0, precision="float32")
    expected = sum(abs(value / 255 - 0.5) > EPS for value in values)
    assert found.clean["torch"] == Proportion(10, 10)
    assert found.worst_case["torch"] == found.transfers[0].robust == Proportion(expected, 10)
    assert found.transfers[0].transfer_rate == Proportion(10 - expected, 10 - expected)


def test_all_figures_by_their_definitions() -> None:
    """Four images, counted by hand. The surrogate's threshold is 0.5, so the attack moves every image by 0.1 to it.

    value        0.31   0.43   0.57   0.69     surrogate: clean right on all, fooled on the middle two
    attacked     0.41   0.53   0.47   0.59
    """
    split = flat_images([79, 110, 145, 176])
    targets: dict[TargetName, By | TorchModel] = {
        "fp32": By(lambda mean: mean > 0.45),  # fooled only by the second image
        "deployed": By(lambda mean: mean > 0.40),  # wrong on the second image from the start; fooled by the first
    }
    found = evaluate(targets, split)
    fp32, deployed = found.transfers
    assert (fp32.attack, fp32.surrogate, fp32.target) == ("pgd-5", "float", "fp32")
    assert found.clean == {"fp32": Proportion(4, 4), "deployed": Proportion(3, 4)}
    assert fp32.robust == Proportion(3, 4)
    assert fp32.transfer_rate == Proportion(1, 2), "of the two fooled on the surrogate, one fools the target"
    assert deployed.robust == Proportion(2, 4)
    assert deployed.transfer_rate == Proportion(0, 1), "the image that it gets wrong clean is not eligible"
    assert found.worst_case == {"fp32": Proportion(3, 4), "deployed": Proportion(2, 4)}


def test_the_worst_case_counts_clean_errors_that_the_attack_happens_to_cure() -> None:
    split = flat_images([102, 140])
    cured: dict[TargetName, By | TorchModel] = {"deployed": By(lambda mean: (mean > 0.35) & (mean < 0.48))}
    found = evaluate(cured, split)
    assert found.clean["deployed"] == Proportion(0, 2)
    assert found.transfers[0].robust.correct == 2, "0.40 -> 0.50 and 0.55 -> 0.45: right under attack"
    assert found.worst_case["deployed"] == Proportion(0, 2)


def test_no_transfer_rate_where_the_surrogate_is_never_fooled() -> None:
    found = evaluate({"deployed": By(lambda mean: mean > 0.5)}, flat_images([0, 255]))
    assert found.transfers[0].transfer_rate is None
    assert found.worst_case["deployed"] == Proportion(2, 2)


def test_the_worst_of_all_restarts_counts_for_every_graph() -> None:
    class Fails:
        """Wrong on the call of the given number: clean is call 0, then one call a restart."""

        def __init__(self, at: int) -> None:
            self.at, self.calls = at, 0

        def predict(self, images: Tensor) -> Tensor:
            right = (images.mean(dim=(1, 2, 3)) > 0.5).long()
            answer = 1 - right if self.calls == self.at else right
            self.calls += 1
            return torch.nn.functional.one_hot(answer, 2).float()

    split = flat_images([0, 255])
    for at, robust in ((0, 0), (1, 0), (2, 0), (3, 0), (4, 2)):
        target = Fails(at)
        how = plan(restarts=3, random_start=True)
        found = evaluate_robustness(threshold(), {"deployed": target}, split, how, seed=0, precision="float32")
        assert target.calls == 4, "clean and three restarts"
        assert found.worst_case["deployed"].correct == robust
        assert found.transfers[0].robust.correct == (2 if at == 0 else robust)


def test_more_restarts_never_raise_the_figure_and_repeat_with_the_seed() -> None:
    torch.manual_seed(1)
    model = linear_model(torch.randn(2, SIDE * SIDE), (1, SIDE, SIDE))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (64, 1, SIDE, SIDE), dtype=np.uint8)
    with torch.no_grad():
        labels = model.predict(torch.from_numpy(pixels).float() / 255).argmax(1).numpy()
    split = Split(ArrayImages("noise", ("a", "b"), pixels, labels), np.arange(64, dtype=np.int64))

    def robust(restarts: int, seed: int = 0) -> int:
        how = plan(1, restarts=restarts, random_start=True)
        found = evaluate_robustness(model, {"torch": model}, split, how, seed=seed, precision="float32")
        return found.worst_case["torch"].correct

    one, four = robust(1), robust(4)
    assert four <= one and robust(4) == four
    assert robust(1) == one


def test_every_restart_has_a_start_of_its_own_whatever_ran_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random start depends on seed, batch and restart alone: not on the number of restarts of earlier batches."""
    split = flat_images([90, 110, 118, 133, 140, 160])
    monkeypatch.setattr(artifacts, "evaluation_batch", lambda _shape: 3)

    def starts(restarts: int, seed: int = 0) -> dict[tuple[int, int], Tensor]:
        found: list[Tensor] = []

        def spy(surrogate: Any, images: Tensor, labels: Tensor, how: PgdPlan, generator: torch.Generator) -> Tensor:
            found.append(torch.rand(4, generator=generator.clone_state()))
            return pgd(surrogate, images, labels, how, generator)

        monkeypatch.setattr(robustness, "pgd", spy)
        how = plan(2, restarts=restarts, random_start=True)
        evaluate_robustness(threshold(), {}, split, how, seed=seed, precision="float32")
        return {divmod(number, restarts): start for number, start in enumerate(found)}

    one, three = starts(1), starts(3)
    assert len(one) == 2 and len(three) == 6
    assert all(torch.equal(start, three[batch, restart]) for (batch, restart), start in one.items())
    assert len({tuple(start.tolist()) for start in three.values()}) == 6
    assert not torch.equal(starts(1, seed=1)[0, 0], one[0, 0])


def test_without_a_random_start_the_figures_do_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    split = flat_images([90, 110, 118, 133, 140, 160])
    model = threshold()
    whole = evaluate_robustness(model, {"torch": model}, split, plan(), seed=0)
    monkeypatch.setattr(artifacts, "evaluation_batch", lambda _shape: 4)
    cut = evaluate_robustness(model, {"torch": model}, split, plan(), seed=0)
    assert whole.worst_case == cut.worst_case and whole.transfers == cut.transfers


def test_the_surrogates_own_network_is_not_scored_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = threshold(), []
    predict = TorchModel.predict

    def counted(self: TorchModel, images: Tensor) -> Tensor:
        calls.append(len(images))
        return predict(self, images)

    monkeypatch.setattr(TorchModel, "predict", counted)
    how = plan(restarts=2, random_start=True)
    found = evaluate_robustness(
        model, {"fp32": By(lambda mean: mean > 0.45), "torch": model}, flat_images([10, 120, 200]), how, seed=0
    )
    assert calls == [3, 3, 3], "clean and two restarts"
    assert [transfer.target for transfer in found.transfers] == ["fp32", "torch"]
    assert found.clean["torch"] == Proportion(3, 3) and found.worst_case["torch"] == Proportion(2, 3)


def test_the_precision_that_was_asked_for_is_that_of_the_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Spy(Surrogate):
        def __init__(self, module: Any, normalization: Any, precision: Any, **options: Any) -> None:
            super().__init__(module, normalization, precision, **options)
            asked.append(str(self.precision))

    monkeypatch.setattr(robustness, "Surrogate", Spy)
    precisions: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    for precision in precisions:
        evaluate_robustness(threshold(), {}, flat_images([10, 200]), plan(), seed=0, precision=precision)
    assert asked == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("norm", "std", "eps", "side", "space"),
    [
        ("linf", 1 / 255, 8.0, 32, "normalised"),  # a network that takes pixels from 0 to 255
        ("linf", 1 / 255, 100.0, 32, "normalised"),
        ("l2", 1 / 255, 300.0, 32, "normalised"),
        ("l2", 0.25, 100.0, 224, "normalised"),
        ("l2", 0.25, 100.0, 224, "pixels"),
    ],
)
def test_rounding_in_other_units_is_no_defect(
    norm: Literal["linf", "l2"], std: float, eps: float, side: int, space: Literal["pixels", "normalised"]
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (8, 3, side, side), dtype=np.uint8)
    split = Split(ArrayImages("noise", ("a", "b"), pixels, np.arange(8) % 2), np.arange(8, dtype=np.int64))
    weight = 1e-4 * torch.randn(2, 3 * side * side, generator=torch.Generator().manual_seed(0))
    model = linear_model(weight, (3, side, side), Normalization((0.5,) * 3, (std,) * 3))
    how = PgdPlan("paper", ThreatModel(norm, eps, space, clip=False), 2, eps, random_start=True)
    found = evaluate_robustness(model, {"torch": model}, split, how, seed=0, precision="float32")
    assert found.worst_case["torch"].correct == 0


def test_the_clipped_share_is_that_of_the_pixels_outside() -> None:
    """Without clipping, images at 0 and 1 are attacked towards the middle, images at the middle never leave."""
    targets: dict[TargetName, By | TorchModel] = {"deployed": By(lambda mean: mean > 0.5)}
    wrong = flat_images([0, 255, 120, 130], labels=[1, 0, 0, 1])  # wrongly labelled: attacked outwards

    def clipped(low: float, high: float) -> float | None:
        how = plan(clip=False)
        return evaluate_robustness(threshold(), targets, wrong, how, seed=0, input_range=(low, high)).clipped_share

    assert clipped(0.0, 1.0) == pytest.approx(0.5)
    assert clipped(-0.05, 1.2) == pytest.approx(0.25)
    assert clipped(-0.2, 1.2) == 0
    assert evaluate(targets, wrong).clipped_share is None


def test_an_attack_that_leaves_its_ball_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "pgd", lambda _s, images, *_rest: (images + 2 * EPS).clamp(0, 1))
    with pytest.raises(RuntimeError, match="left its threat model"):
        evaluate({"deployed": By(lambda mean: mean > 0.5)}, flat_images([10, 200]))


def test_the_network_is_left_as_it_was() -> None:
    model = threshold()
    before = [parameter.clone() for parameter in model.module.parameters()]
    flags = [parameter.requires_grad for parameter in model.module.parameters()]
    evaluate_robustness(model, {"torch": model}, flat_images([10, 200]), plan(), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.module.parameters(), strict=True))
    assert [parameter.requires_grad for parameter in model.module.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_torch_networks_are_scored_where_they_compute_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device `meta` stands for a GPU: the networks move there as copies, other graphs stay."""
    monkeypatch.setattr(robustness, "compute_device", lambda: torch.device("meta"))
    model, other, graph = threshold(), threshold(0.4), By(lambda mean: mean > 0.5)
    judges = robustness._Judges(model, {"torch": model, "fp32": other, "deployed": graph})
    placed = [judges._own, judges._others["fp32"]]
    assert all(isinstance(judge, TorchModel) and judge.module.mean.device.type == "meta" for judge in placed)
    assert judges._others["deployed"] is graph and "torch" not in judges._others
    assert {found.module.mean.device.type for found in (model, other)} == {"cpu"}
