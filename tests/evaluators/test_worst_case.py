from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.evaluators.greys import (
    EPS,
    SIDE,
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
from tests.toys import linear_model
from toolkit.artifacts import Normalization, Predictor, Proportion, Split, TorchModel
from toolkit.attacks.ensemble import QUERIES as ALL_QUERIES
from toolkit.attacks.ensemble import SQUARE, Pass
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.survivors import Settle
from toolkit.attacks.threat import ThreatModel
from toolkit.evaluators import evaluation, worst_case
from toolkit.evaluators.evaluation import Clock, Evaluation
from toolkit.evaluators.journal import Journal
from toolkit.evaluators.robustness import arm
from toolkit.evaluators.scoring import FILE, SurrogateName, TargetName
from toolkit.evaluators.worst_case import PassRecord, pursue

pytestmark = pytest.mark.usefixtures("quiet")
QUERIES = Pass("square", 20)


def run_passes(
    run: Evaluation, surrogates: Mapping[SurrogateName, TorchModel] | None = None
) -> tuple[tuple[PassRecord, ...], tuple[str, ...]]:
    surrogates = {"float": threshold()} if surrogates is None else surrogates
    return pursue(arm(surrogates, run.conditions), {}, run)


class Moves(Pass):
    """An attack that shifts all pixels of every image by `steps` thousandths, and submits all that it was given."""

    def run(
        self,
        _surrogate: Surrogate,
        images: Tensor,
        _labels: Tensor,
        _threat: ThreatModel,
        _: object,
        settle: Settle,
        start: Tensor | None = None,
    ) -> None:
        images = images if start is None else start
        settle((images + self.steps / 1000).clamp(0, 1), torch.arange(len(images)))


def moves(*shifts: int) -> tuple[Pass, ...]:
    return tuple(Moves("moves", shift) for shift in shifts)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 255), min_size=1, max_size=8),
    shifts=st.lists(st.integers(-99, 99), max_size=4),  # 100 is 25.5 levels, which can lie on a boundary
    ends=st.tuples(st.integers(1, 254), st.integers(1, 254)),
)
def test_figures_are_the_minimum_over_all_attacks_and_images_stay_until_all_judges_are_fooled(
    values: list[int], shifts: list[int], ends: tuple[int, int]
) -> None:
    """Recounted with plain arithmetic on grey values: fp32, deployed, and the deployed graph behind an 8-bit file."""
    at = [(end + 0.5) / 255 for end in ends]
    split = flat_images(values)
    targets: dict[TargetName, Predictor] = {"fp32": above(at[0]), "deployed": above(at[1])}
    run = an_evaluation(targets, split, conditions(a_plan(), *moves(*shifts)))
    records, not_run = run_passes(run)

    truth = [value > 127 for value in values]
    standing = [[value / 255 > at[judge] for value in values] for judge in (0, 1, 1)]
    standing = [[answer == true for answer, true in zip(judge, truth, strict=True)] for judge in standing]
    expected = []
    for shift in shifts:
        tried = [index for index in range(len(values)) if any(judge[index] for judge in standing)]
        fooled = 0
        for index in tried:
            attacked = min(1.0, max(0.0, values[index] / 255 + shift / 1000))
            levels = round(float(np.clip(shift * 0.255, -25, 25))) + values[index]  # halves do not occur
            right = [(attacked > at[0]) == truth[index], (attacked > at[1]) == truth[index]]
            right.append(right[1] or (min(255, max(0, levels)) / 255 > at[1]) == truth[index])
            fooled += standing[1][index] and not right[1]
            for judge in range(3):
                standing[judge][index] = standing[judge][index] and right[judge]
        if tried:
            expected.append((len(tried), fooled))
    assert [run.ledger.worst[name].tolist() for name in ("fp32", "deployed", FILE)] == standing
    assert [(record.attempted, record.fooled) for record in records] == expected
    assert not_run == ()


def seen_by(run: Evaluation, monkeypatch: pytest.MonkeyPatch, surrogate: TorchModel) -> list[int]:
    """How many images each gradient of one pass was asked for."""
    asked: list[int] = []
    differentiate = Surrogate.differentiate

    def spy(self: Surrogate, images: Tensor, loss: Any) -> Any:
        asked.append(len(images))
        return differentiate(self, images, loss)

    monkeypatch.setattr(Surrogate, "differentiate", spy)
    run_passes(run, {"float": surrogate})
    return asked


def test_a_fooled_surrogate_drops_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The surrogate is fooled from the first step, the graphs never are: every gradient is of all images."""
    never: dict[TargetName, Predictor] = {"fp32": above(0.2), "deployed": above(0.2)}
    run = an_evaluation(never, flat_images([135, 140, 145]), conditions(a_plan(), Pass("apgd-ce", 12)))
    assert seen_by(run, monkeypatch, threshold()) == [3] * 12
    assert run.ledger.worst["deployed"].all()


@pytest.mark.parametrize(
    ("fp32", "deployed", "dropped"),
    [(0.5, 0.5, True), (0.2, 0.5, False), (0.5, 0.2, False)],
)
def test_an_image_is_dropped_only_when_all_compared_graphs_are_fooled(
    monkeypatch: pytest.MonkeyPatch, fp32: float, deployed: float, dropped: bool
) -> None:
    targets: dict[TargetName, Predictor] = {"torch": above(0.0), "fp32": above(fp32), "deployed": above(deployed)}
    run = an_evaluation(targets, flat_images([140, 140, 250]), conditions(a_plan(), Pass("apgd-ce", 15)))
    asked = seen_by(run, monkeypatch, threshold())
    assert asked[0] == 3 and asked[-1] == (1 if dropped else 3)
    assert run.ledger.worst["fp32"].tolist() == [fp32 == 0.2] * 2 + [True]
    assert run.ledger.worst["deployed"].tolist() == [deployed == 0.2] * 2 + [True]


def test_an_image_is_attacked_on_while_its_file_still_stands() -> None:
    """The boundary lies within the ball, but no grey level beyond it does: only the file is right to the end."""
    plan = a_plan(eps=10.4 / 255)
    at = 129.8 / 255  # from 140 the ball ends at 129.6, levels at 130
    run = an_evaluation({"deployed": above(at)}, flat_images([140]), conditions(plan, Pass("apgd-ce", 8), QUERIES))
    records, _ = run_passes(run)
    assert not run.ledger.worst["deployed"].any() and run.ledger.worst[FILE].all()
    assert [(record.attack, record.attempted, record.fooled) for record in records] == [
        ("apgd-ce", 1, 1),
        ("square", 1, 0),
    ], "the second attack is made although the graph is fooled, and is not credited with it"


def test_an_image_may_be_fooled_on_each_graph_by_another_attack() -> None:
    """0.55 moved down fools the one, moved up the other; then no third attack is made on it."""
    targets: dict[TargetName, Predictor] = {"fp32": above(0.5), "deployed": threshold(0.6, slope=-1.0)}
    run = an_evaluation(targets, flat_images([140]), conditions(a_plan(), *moves(-90, 90, 10)))
    records, _ = run_passes(run)
    assert [record.attempted for record in records] == [1, 1]
    assert not any(flags.any() for flags in run.ledger.worst.values())


def test_square_runs_where_there_is_no_surrogate() -> None:
    passes = (Pass("apgd-ce", 5, everywhere=True), Pass("apgd-t", 5, (1,)), QUERIES)
    run = an_evaluation({"deployed": above(0.5)}, flat_images([120, 135, 250]), conditions(a_plan(), *passes))
    records, not_run = run_passes(run, {})
    (record,) = records
    assert (record.attack, record.surrogate, record.graphs[0]) == ("square", None, "deployed")
    assert record.steps == ALL_QUERIES, "alone it is no short check"
    assert record.attempted == 3
    assert run.ledger.worst["deployed"].tolist()[2] and record.fooled == 3 - int(run.ledger.worst["deployed"].sum())
    assert not_run == tuple(f"{how}: there is no network to make it on" for how in passes[:2])


def test_square_alone_fools_what_is_easy() -> None:
    """Noise, in a ball of half the pixel range."""
    model = random_model()
    run = an_evaluation({"deployed": model}, noise_images(30, model), conditions(a_plan(eps=0.5), Pass("square", 60)))
    (record,), _ = run_passes(run, {})
    assert record.fooled == 30 and not run.ledger.worst["deployed"].any()


@pytest.mark.parametrize("masked", [True, False])
def test_where_queries_find_what_gradients_should_have_they_go_on_everywhere(masked: bool) -> None:
    """Where gradients mislead nothing comes near the boundary, so that no search may wait for that."""
    model = random_model()
    passes = (Pass("apgd-ce", 20), QUERIES, Pass(SQUARE, 60, near=0.9), Pass(SQUARE, 70, where_masked=True))
    how = conditions(a_plan(eps=0.3 if masked else 0.05), *passes)
    run = an_evaluation({"deployed": model}, noise_images(30, model), how)
    surrogate = linear_model(torch.zeros(2, SIDE**2), (1, SIDE, SIDE)) if masked else model
    records, _ = run_passes(run, {"float": surrogate})
    queries = [record for record in records if record.attack == "square"]
    left = 30 - sum(record.fooled for record in records)
    if masked:
        assert queries[0].fooled > 3 and queries[-1].steps == 70 and queries[-1].fooled > 0
        assert queries[-1].attempted == left + queries[-1].fooled, "on all that stood"
        assert left == int(run.ledger.worst["deployed"].sum())
    else:
        assert sum(record.fooled for record in queries) <= 3
        assert 70 not in [record.steps for record in queries]
        assert left > 0, "there was something to search"


def test_passes_run_on_the_best_surrogate_or_on_all_and_queries_last() -> None:
    passes = (QUERIES, Pass("apgd-ce", 3, everywhere=True), Pass("apgd-t", 3, (1,)))
    run = an_evaluation({"deployed": above(0.2)}, flat_images([200]), conditions(a_plan(), *passes))
    surrogates: dict[SurrogateName, TorchModel] = {"float": threshold(), "twin": threshold()}
    records, _ = pursue(arm(surrogates, run.conditions), {"deployed": ("twin",)}, run)
    assert [(record.attack, record.surrogate) for record in records] == [
        ("apgd-ce", "float"),
        ("apgd-ce", "twin"),
        ("apgd-t", "twin"),
        ("square", None),
    ]


def test_every_graph_is_attacked_on_the_surrogate_that_transfers_to_it_best() -> None:
    targets: dict[TargetName, Predictor] = {"fp32": above(0.3), "deployed": above(0.3)}
    surrogates: dict[SurrogateName, TorchModel] = {"float": threshold(), "twin": threshold()}
    passes = (QUERIES, Pass("apgd-ce", 3), Pass("apgd-ce", 4, everywhere=True))
    run = an_evaluation(targets, flat_images([140, 250]), conditions(a_plan(), *passes))
    records, _ = pursue(arm(surrogates, run.conditions), {"fp32": ("float",), "deployed": ("twin",)}, run)
    assert [(record.steps, record.surrogate, record.graphs[0]) for record in records] == [
        (3, "twin", "deployed"),
        (3, "float", "fp32"),
        (4, "float", "deployed"),
        (4, "twin", "deployed"),
        (20, None, "deployed"),
        (20, None, "fp32"),
    ]


def test_a_graph_may_be_attacked_on_two_surrogates() -> None:
    targets: dict[TargetName, Predictor] = {"fp32": above(0.3), "deployed": above(0.3)}
    surrogates: dict[SurrogateName, TorchModel] = {"float": threshold(), "twin": threshold()}
    run = an_evaluation(targets, flat_images([140, 250]), conditions(a_plan(), Pass("apgd-ce", 3)))
    records, _ = pursue(arm(surrogates, run.conditions), {"fp32": ("float",), "deployed": ("float", "twin")}, run)
    assert [(record.surrogate, record.graphs) for record in records] == [
        ("float", ("deployed", "fp32")),
        ("twin", ("deployed",)),
    ]


@pytest.mark.parametrize(("fp32", "deployed"), [(0.5, 0.2), (0.2, 0.5)])
def test_an_attack_for_one_graph_leaves_out_what_that_graph_has_lost(fp32: float, deployed: float) -> None:
    """Of 140 and 250 the first falls where the threshold is 0.5: what no longer stands of a graph is left out."""
    targets: dict[TargetName, Predictor] = {"fp32": above(fp32), "deployed": above(deployed)}
    surrogates: dict[SurrogateName, TorchModel] = {"float": threshold(), "twin": threshold()}
    run = an_evaluation(targets, flat_images([140, 250]), conditions(a_plan(), *moves(-90, -95), QUERIES))
    records, _ = pursue(arm(surrogates, run.conditions), {"fp32": ("float",), "deployed": ("twin",)}, run)
    tried = {(record.attack, record.steps, record.graphs[0]): record.attempted for record in records}
    easy: TargetName = "fp32" if fp32 == 0.5 else "deployed"
    hard: TargetName = "deployed" if fp32 == 0.5 else "fp32"
    assert [tried["moves", steps, hard] for steps in (-90, -95)] == [2, 2] and tried["square", 20, hard] == 2
    assert tried["moves", -90, easy] == (1 if easy == "fp32" else 2), "it falls to the attack made for the other"
    assert tried["moves", -95, easy] == tried["square", 20, easy] == 1
    assert not run.ledger.worst[easy][0] and run.ledger.worst[hard].all()


def test_an_attack_for_one_graph_ends_on_what_fools_that_graph_alone() -> None:
    answers: list[bool] = []

    class Watched(Moves):
        """Notes whether its first image is done."""

        def run(
            self,
            surrogate: Surrogate,
            images: Tensor,
            labels: Tensor,
            threat: ThreatModel,
            _: object,
            settle: Settle,
            start: Tensor | None = None,
        ) -> None:
            def watched(attacked: Tensor, positions: Tensor) -> Tensor:
                done = settle(attacked, positions)
                answers.append(bool(done[0]))
                return done

            super().run(surrogate, images, labels, threat, _, watched, start)

    targets: dict[TargetName, Predictor] = {"fp32": above(0.2), "deployed": above(0.5)}
    surrogates: dict[SurrogateName, TorchModel] = {"float": threshold(), "twin": threshold()}
    run = an_evaluation(targets, flat_images([140]), conditions(a_plan(), Watched("moves", -90)))
    pursue(arm(surrogates, run.conditions), {"fp32": ("float",), "deployed": ("twin",)}, run)
    assert answers == [True, False], "140 falls at 0.5, and stands at 0.2"


def test_a_search_by_queries_asks_the_graph_that_it_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    targets: dict[TargetName, Predictor] = {"fp32": above(0.2), "deployed": above(0.2)}
    asked: list[Predictor] = []
    monkeypatch.setattr(worst_case, "square", lambda target, *_, **__: asked.append(target))
    run = an_evaluation(targets, flat_images([140]), conditions(a_plan(), QUERIES))
    run_passes(run)
    assert asked[0] is targets["deployed"] and asked[1] is targets["fp32"] and len(asked) == 2


def test_a_search_goes_on_from_what_came_nearest_and_from_there_again_when_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Moved down by 0.09, grey 160 has 0.037 left of 0.127; grey 230 is far away still."""
    starts: list[Tensor] = []
    monkeypatch.setattr(worst_case, "square", lambda *_, start, **__: starts.append(start))
    passes = (*moves(-90), Moves("moves", -50), Pass(SQUARE, 9, near=0.5, onward=True))
    for resume in (False, True):
        journal = Journal(tmp_path / "j", "run", resume=resume)
        run = an_evaluation(
            {"deployed": threshold()}, flat_images([160, 230]), conditions(a_plan(), *passes), journal=journal
        )
        records, _ = run_passes(run)
        journal.close()
        if not resume:
            with sqlite3.connect(tmp_path / "j") as database:
                database.execute("DELETE FROM entry WHERE key LIKE '%square%'")
    assert (records[-1].attempted, records[-1].onward) == (1, True)
    for start in starts:
        torch.testing.assert_close(start, torch.full((1, 1, SIDE, SIDE), 160 / 255 - 0.09))
    assert len(starts) == 2


def test_long_attacks_go_by_the_margin_of_the_graph_that_they_are_made_for() -> None:
    """Moved down by 0.09, grey 140 comes from 0.549 near 0.44, but not near 0.2."""
    targets: dict[TargetName, Predictor] = {"fp32": threshold(0.44), "deployed": threshold(0.2)}
    surrogates: dict[SurrogateName, TorchModel] = {"float": threshold(), "twin": threshold()}
    passes = (*moves(-90), Moves("moves", -95, near=0.75))
    run = an_evaluation(targets, flat_images([140]), conditions(a_plan(), *passes))
    records, _ = pursue(arm(surrogates, run.conditions), {"fp32": ("float",), "deployed": ("twin",)}, run)
    assert [(record.steps, record.graphs[0]) for record in records] == [(-90, "deployed"), (-90, "fp32"), (-95, "fp32")]


def test_searches_towards_several_classes_share_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five images towards three classes each, in batches of six; a copy that fools decides its image."""
    monkeypatch.setattr(evaluation, "evaluation_batch", lambda _shape: 6)
    weight = torch.randn(4, SIDE * SIDE, generator=torch.Generator().manual_seed(3))
    model = linear_model(weight, (1, SIDE, SIDE), Normalization((0.5,), (0.5,)))
    split = noise_images(5, model, classes=4)
    short = an_evaluation({"deployed": model}, split, conditions(a_plan(), Pass("apgd-t", 1, (1, 2, 3))))
    assert seen_by(short, monkeypatch, model) == [6, 6, 3]
    run = an_evaluation({"deployed": model}, split, conditions(a_plan(), Pass("apgd-t", 12, (1, 2, 3))))
    run_passes(run, {"float": model})
    assert not run.ledger.worst["deployed"].any(), "the radius is large"


def test_long_attacks_are_made_on_images_near_the_boundary_only() -> None:
    """Moved down by 0.09, grey 140 loses 0.09 of its distance 0.049, 230 and 160 0.09 of 0.402 and 0.127."""
    passes = (*moves(-90), Moves("moves", -95, near=0.5), Moves("moves", -80))
    run = an_evaluation({"deployed": threshold()}, flat_images([140, 230, 160]), conditions(a_plan(), *passes))
    records, _ = run_passes(run)
    assert [(record.steps, record.attempted) for record in records] == [(-90, 3), (-95, 1), (-80, 2)]
    shares = torch.tensor([0.09, 0.09]) / (torch.tensor([230.0, 160.0]) / 255 - 0.5)
    torch.testing.assert_close(run.ledger.progress("deployed")[1:], torch.tensor([shares[0], shares[1] * 95 / 90]))


def test_a_pass_on_nothing_leaves_no_record() -> None:
    run = an_evaluation({"deployed": above(0.5)}, flat_images([140, 10], labels=[0, 1]), conditions(a_plan(), QUERIES))
    assert run_passes(run) == ((), ())


def test_every_pass_and_chunk_has_randomness_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It depends on seed, pass and chunk alone, so that what a resumed run skips does not change the rest."""
    monkeypatch.setattr(evaluation, "evaluation_batch", lambda _shape: 2)

    def starts(seed: int) -> list[tuple[float, ...]]:
        found: list[tuple[float, ...]] = []

        def spy(*_: Any, generator: torch.Generator, **__: Any) -> None:
            found.append(tuple(torch.rand(3, generator=generator).tolist()))

        monkeypatch.setattr(worst_case, "square", spy)
        how = conditions(a_plan(), QUERIES, QUERIES, seed=seed)
        run_passes(an_evaluation({"deployed": above(0.5)}, flat_images([10, 200, 210]), how))
        return found

    assert len(set(starts(0))) == 4 and starts(0) == starts(0)
    assert not set(starts(0)) & set(starts(1))


@pytest.mark.parametrize("left", range(6))
def test_what_the_time_does_not_suffice_for_is_listed(monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    """Three passes of two chunks: the figures are those of the chunks that were attacked, each by hand."""
    monkeypatch.setattr(evaluation, "evaluation_batch", lambda _shape: 2)
    split = flat_images([160, 150, 140])
    how = conditions(a_plan(), *moves(-60, -90, -99))
    run = an_evaluation({"deployed": above(0.5)}, split, how, clock=cast("Clock", Countdown(left)))
    records, not_run = run_passes(run)
    # -0.06 fools 140 (0.549), -0.09 150 (0.588), and 160 (0.627) stands
    whole = (
        "moves--60 on float: 3 of 3 images",
        "moves--90 on float: 2 of 2 images",
        "moves--99 on float: 1 of 1 images",
    )
    late = ("moves--90 on float: 3 of 3 images", "moves--99 on float: 3 of 3 images")
    expected: dict[int, tuple[tuple[str, ...], list[tuple[int, int]], list[bool]]] = {
        0: ((whole[0], *late), [], [True, True, True]),
        1: (("moves--60 on float: 1 of 3 images", *late), [(2, 0)], [True, True, True]),
        2: ((whole[1], "moves--99 on float: 2 of 2 images"), [(3, 1)], [True, True, False]),
        3: ((whole[2],), [(3, 1), (2, 1)], [True, False, False]),
    }
    complete = ((), [(3, 1), (2, 1), (1, 0)], [True, False, False])
    wanted = expected.get(left, complete)
    assert not_run == wanted[0]
    assert [(record.attempted, record.fooled) for record in records] == wanted[1]
    assert run.ledger.worst["deployed"].tolist() == wanted[2]


def test_an_attack_that_leaves_its_threat_model_is_a_defect() -> None:
    run = an_evaluation({"deployed": above(0.5)}, flat_images([160]), conditions(a_plan(), *moves(-101)))
    with pytest.raises(RuntimeError, match="left its threat model"):
        run_passes(run)


def test_the_gallery_holds_one_file_for_each_image_whose_file_is_fooled(tmp_path: Path) -> None:
    model = random_model()
    split = noise_images(40, model)
    how = conditions(a_plan(eps=0.05), Pass("apgd-ce", 10), Pass("square", 30))
    run = an_evaluation({"deployed": model}, split, how, gallery=tmp_path)
    run_passes(run, {"float": model})
    fooled = (~run.ledger.worst[FILE]).nonzero()[:, 0].tolist()
    assert sorted(int(path.name[:6]) for path in tmp_path.iterdir()) == fooled and 0 < len(fooled) < 40


def test_a_linear_network_falls_exactly_where_its_distance_is_within_the_radius() -> None:
    """In l-inf the distance of a linear network is its margin over the weights' l1 norm, without the pixel range."""
    model = random_model()
    split = noise_images(60, model)
    images = split.take(np.arange(60)).images
    weight = (model.network[1].weight[1] - model.network[1].weight[0]).detach() / 0.5  # type: ignore[index]
    logits = model.predict(images)
    away = (logits[:, 1] - logits[:, 0]).abs()
    sign = torch.where(logits.argmax(dim=1) == 1, -1.0, 1.0)[:, None] * weight.sign()
    reach = torch.where(sign > 0, (1 - images.flatten(1)).clamp_max(EPS), images.flatten(1).clamp_max(EPS))
    falls = (reach * weight.abs()).sum(dim=1) > away
    run = an_evaluation({"deployed": model}, split, conditions(a_plan(), Pass("apgd-ce", 20)))
    run_passes(run, {"float": model})
    assert torch.equal(~run.ledger.worst["deployed"], falls)
    assert run.ledger.proportions()["deployed"] == Proportion(60 - int(falls.sum()), 60) and 5 < falls.sum() < 55


def test_the_split_may_be_a_part_of_its_images() -> None:
    """Positions count within the split, not within the image set."""
    images = flat_images([140, 10, 250, 140]).images
    run = an_evaluation({"deployed": above(0.5)}, Split(images, np.array([2, 3])), conditions(a_plan(), *moves(-60)))
    run_passes(run)
    assert run.ledger.worst["deployed"].tolist() == [True, False]
