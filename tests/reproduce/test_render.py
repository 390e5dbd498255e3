from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from toolkit.artifacts import Proportion
from toolkit.reproduce.document import together
from toolkit.reproduce.paper import Figure as Number
from toolkit.reproduce.plots import draw
from toolkit.reproduce.render import render
from toolkit.reproduce.statistics import Mean, compare

Json = dict[str, Any]


def cell(*shares: int, column: str = "adversarial", missing: Json | None = None, theirs: float | None = 80.0) -> Json:
    """Planted numbers: `shares` are right of 1,000, clean; half of that under attack."""
    runs = [{"seed": n, "test": Proportion(s, 1000).as_dict(), "robust": Proportion(s // 2, 1000).as_dict(),
             "worst_case": Proportion(s // 4, 1000).as_dict()}
            for n, s in enumerate(shares)]  # fmt: skip
    means, agreement = {}, {}
    for name, part in (("test", 1), ("robust", 2)):
        if shares:
            mean = Mean(tuple(Proportion(share // part, 1000) for share in shares))
            means[name] = {"value": mean.value, "error": mean.error, "text": str(mean)}
            found = compare(mean, Number(theirs or 0, 1.0))
            agreement[name] = {"text": str(found), "within": found.within, "p_value": found.p_value}
    figure = {"mean": theirs, "error": 1.0}
    return {
        "row": "pruned",
        "column": column,
        "measure_text": "an attack",
        "in_paper": column == "adversarial",
        "runs": runs,
        "missing": missing or {},
        "means": means,
        "paper": {"test": figure, "robust": figure} if theirs else None,
        "agreement": agreement if theirs and shares else None,
    }


def document(kind: str = "main", **panel: Any) -> Json:
    empty: Json = {"cells": [], "curves": [], "title": "Fashion-MNIST", "network": "cnn8", "comparable": True}
    return {
        "target": "table3",
        "title": "a title",
        "kind": kind,
        "place": "main text",
        "numbering": "",
        "protocol": "paper",
        "seeds": [0, 1],
        "deviations": ["one difference"],
        "environment": {"cpu": "a processor", "threads": 1, "versions": {"torch": "2"}},
        "panels": [{**empty, "evaluation_images": 1000, "attack_images": 100, **panel}],
    }


def row(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [part.strip() for part in line.strip("|").split("|")]


def test_all_figures_of_a_table_are_judged_together() -> None:
    """Ours 80 and 40 with two seeds beside 80; a cell of one seed and one that the paper lacks do not count."""
    cells = [cell(780, 820), cell(700), cell(), cell(600, 620, theirs=None)]
    found = together(cells)
    assert found is not None and found["within"] == 1
    assert [one["quantity"] for one in found["figures"]] == ["test", "robust"]
    even, far = found["figures"]
    assert even["p_value"] == even["p_corrected"] == pytest.approx(1) and far["p_corrected"] == 2 * far["p_value"]
    text = render(document(cells=cells, together=found))
    assert "of 2 figures for which both sides know their seeds' spread, 1 are within" in text
    assert f"(pruned, fine-tuning adversarial, robust) has p = {far['p_value']:.2g}" in text
    assert together([cell(700)]) is None and "Together" not in render(document(cells=[cell(700)], together=None))


def test_ours_stands_beside_the_papers() -> None:
    found = row(render(document(cells=[cell(780, 820)])), "pruned")
    assert found[:4] == ["pruned", "adversarial", "80.00 ± 2.00", "80.00 ± 1.00"]
    assert found[4] == "+0.00, within 2 x 2.24 (our 2 seeds and the paper's)"
    assert found[5] == "40.00 ± 1.00" and found[7].startswith("-40.00, OUTSIDE 2 x 1.41")


def test_a_cell_that_was_not_run_says_so() -> None:
    found = row(render(document(cells=[cell(missing={"0": "a reason", "1": "a reason"})])), "pruned")
    assert found[2] == "not run: a reason" and found[3] == "80.00 ± 1.00" and found[5] == "not run"


def test_seeds_that_are_missing_are_named() -> None:
    found = row(render(document(cells=[cell(800, missing={"1": "not yet"})])), "pruned")
    assert found[2] == "80.00 [77.41, 82.36] (n = 1 seed(s); seed 1 not run)"


def test_what_the_paper_does_not_have_is_a_table_of_its_own() -> None:
    cells = [
        cell(800, column="AutoAttack", theirs=None),
        cell(column="DeepFool", missing={"0": "no time"}, theirs=None),
    ]
    text = render(document(cells=cells))
    assert "### What the paper does not have" in text and "- not run: no time" in text
    assert row(text, "pruned") == ["pruned", "80.00 [77.41, 82.36] / 40.00 [37.01, 43.07]", "not run"]


@pytest.mark.parametrize(("elsewhere", "told"), [((400, 200), True), ((400, 391), False), ((), False)])
def test_masked_gradients_are_told(elsewhere: tuple[int, ...], *, told: bool) -> None:
    """The worst case over both is less anyway; that one of them alone leaves less shows that the other is misled."""
    tried = cell(800, column="PGD-20", theirs=None)
    tried["runs"][0]["by_surrogate"] = {str(n): Proportion(n, 1000).as_dict() for n in elsewhere}
    found = row(render(document(cells=[tried])), "pruned")[1]
    assert found == "80.00 [77.41, 82.36] / 40.00 [37.01, 43.07]" + "; worst case 20.00" * told


def test_other_images_are_said_not_to_be_the_papers() -> None:
    text = render(document(cells=[cell(800, theirs=None)], comparable=False))
    assert "Not the paper's data set" in text and row(text, "pruned")[3] == "not comparable"


def test_time_is_told_as_a_share_of_full_training_and_energy_where_it_is_known() -> None:
    def spent(seconds: float, joules: float | None, lost: int = 0) -> Json:
        return {"seed": 0, "seconds": seconds, "cpu_seconds": seconds / 2, "joules": joules, "lost": lost}

    rows = [
        {"row": "full", "runs": [spent(6000, 7200.0)], "missing": {}},
        {"row": "tuned", "runs": [spent(600, None, lost=1)], "missing": {}},
        {"row": "other", "runs": [], "missing": {"0": "a reason"}},
    ]
    text = render(document("time", times=rows))
    assert row(text, "full") == ["full", "1", "100.0", "50.0", "1.000", "2.00"]
    found = row(text, "tuned")
    assert found[2:5] == ["10.0 (at least: 1 sitting(s) were killed)", "5.0", "0.100"]
    assert found[5] == "not measured: the machine does not tell"
    assert row(text, "other")[2] == "not run: a reason"


def curve(axis: str, values: dict[float, tuple[int, ...]]) -> Json:
    return {"title": "a curve", "axis": axis, "points": [{"x": x, **cell(*found)} for x, found in values.items()]}


def test_a_share_of_fewer_seeds_than_the_time_says_so() -> None:
    spent = {"seconds": 60.0, "cpu_seconds": 60.0, "joules": None, "lost": 0}
    rows = [
        {"row": "full", "runs": [{**spent, "seed": 0, "cpu_seconds": 100.0}], "missing": {"1": "not yet"}},
        {"row": "ours", "runs": [{**spent, "seed": seed} for seed in (0, 1)], "missing": {}},
    ]
    assert row(render(document("time", times=rows)), "ours")[1:5] == ["2", "1.0", "1.0", "0.600 (1 seed(s))"]


def test_figures_of_networks_that_were_made_again_are_marked() -> None:
    old, new = cell(780, 820), cell(800)
    old["runs"][1]["mixed"] = True
    new["row"] = "another"
    text = render(document(cells=[old, new]))
    assert row(text, "pruned")[2] == "80.00 ± 2.00 †" and row(text, "pruned")[5] == "40.00 ± 1.00 †"
    assert "†" not in row(text, "another")[2] and text.count("†: of a network that was trained again since") == 1
    assert "†" not in render(document(cells=[new]))


def test_curves_are_tables_too() -> None:
    text = render(document("curves", curves=[curve("bits", {8.0: (800, 820), 4.0: ()})]))
    assert row(text, "8")[1:] == ["81.00 ± 1.00", "40.50 ± 0.50", "20.00, 20.50", "2"]
    assert row(text, "4")[1].startswith("not run")


def test_a_missing_layout_says_why() -> None:
    assert "not run: a reason" in render(document("embedding", embedding={"missing": "a reason"}))


def inked(path: Path) -> float:
    """Share of pixels that are not white."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    return float((pixels < 250).mean())


@pytest.mark.parametrize(
    "panel",
    [
        {"cells": [cell(780, 820), cell(800)]},
        {"curves": [curve("bits", {8.0: (800, 820), 4.0: (300,), 2.0: ()}), curve("share", {0.1: (800,)})]},
    ],
)
def test_what_is_known_is_drawn(tmp_path: Path, panel: Json) -> None:
    assert draw(document(**panel), tmp_path / "plot.png")
    assert 0.02 < inked(tmp_path / "plot.png") < 0.9


def test_points_that_were_not_run_are_gaps_and_single_seeds_have_no_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_arguments, **_options: drawn.append(self))
    points = {0.1: (800, 820), 0.2: (800,), 0.3: (), 0.9: (700, 720)}
    assert draw(document(curves=[curve("share", points)]), tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "0.2", "0.3", "0.9"]
    (container, *_) = axes.containers
    assert isinstance(container, ErrorbarContainer)
    line, _, (bars,) = container.lines
    assert isinstance(line, Line2D) and isinstance(bars, LineCollection)
    assert list(np.asarray(line.get_xdata())) == [0, 1, 2, 3]
    assert list(np.asarray(line.get_ydata())) == pytest.approx([81, 80, np.nan, 71], nan_ok=True)
    heights = [float(np.ptp(segment[:, 1])) for segment in bars.get_segments() if np.ndim(segment) == 2]
    assert [height for height in heights if np.isfinite(height)] == pytest.approx([2, 2]), "twice the standard error"
    single = next(line for line in axes.lines if line.get_label() == "test: one network")
    assert list(np.asarray(single.get_ydata())) == pytest.approx([80, np.nan], nan_ok=True)


def test_layouts_are_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    points: Json = {f"a|{layer}": rng.random((20, 2)) for layer in ("input", "layer 8")}
    np.savez(tmp_path / "points.npz", **points)
    embedding = {"networks": {"a": ""}, "layers": ["input", "layer 8"], "file": str(tmp_path / "points.npz")}
    assert draw(document("embedding", embedding=embedding), tmp_path / "plot.png")
    assert inked(tmp_path / "plot.png") > 0.01


def test_nothing_known_is_not_drawn(tmp_path: Path) -> None:
    assert not draw(document(cells=[cell(missing={"0": "a reason"})]), tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()


def test_runs_of_several_machines_are_told_apart() -> None:
    """Times of training are shares of a full training on the same machine alone."""
    machines: list[Json] = [{"cpu": name, "gpus": [], "torch": "2"} for name in ("slow", "fast")]
    one, other = machines
    spent = {"seed": 0, "threads": 1, "seconds": 60.0, "cpu_seconds": 60.0, "joules": None, "lost": 0}
    rows = [
        {"row": row, "runs": [{**spent, "cpu_seconds": seconds, "machine": machine}], "missing": {}}
        for row, seconds, machine in (("full", 100.0, one), ("ours", 50.0, one), ("elsewhere", 10.0, other))
    ]
    text = render(document("time", times=rows))
    assert "Run on: slow, torch 2; fast, torch 2." in text
    assert [row(text, name)[4] for name in ("full", "ours")] == ["1.000", "0.500"]
    assert row(text, "elsewhere")[4] == "not known: no full training on this machine"
    assert "a machine not noted down" in render(document(cells=[cell(780)]))
