"""The evidence of robustness in words: nothing that doubts a figure stands away from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import World
from toolkit.bundle import read_report
from toolkit.reports.markdown import render_markdown
from toolkit.reports.robustness import (
    JUDGES,
    matrix_rows,
    pass_rows,
    plan_text,
    robust_text,
    robustness_section,
    transfer_rows,
)
from toolkit.reports.schema import PassRecord, Report, SaturationRecord, WorstCase
from toolkit.reports.summary import render_summary


@pytest.fixture
def report(hardened: World) -> Report:
    return read_report(hardened.bundle)


def section(report: Report) -> str:
    return robustness_section(report, {"deployed": report.robust_accuracy.deployed})


def test_the_matrix_has_a_row_for_each_surrogate_and_a_column_for_each_target(report: Report) -> None:
    for header, rows in (matrix_rows(report), transfer_rows(report)):
        assert header == ("made on", *(JUDGES[name] for name in ("torch", "fp32", "deployed", "deployed_unoptimised")))
        assert len(rows) == 4 and all(len(row) == len(header) for row in rows)
    cells = {(cell.surrogate, cell.target): cell for cell in report.robustness}
    float_row = next(row for row in matrix_rows(report)[1] if row[0] == "float network")
    assert float_row[3].startswith(f"{cells['float', 'deployed'].value:.2%} [")
    rates = next(row for row in transfer_rows(report)[1] if row[0] == "float network")
    assert rates[3].endswith(f" of {cells['float', 'deployed'].transfer_n}")


def test_a_cell_that_was_not_reached_leaves_the_table_whole(report: Report) -> None:
    cut = report.model_copy(
        update={"robustness": [c for c in report.robustness if (c.surrogate, c.target) != ("twin", "fp32")]}
    )
    header, rows = matrix_rows(cut)
    assert all(len(row) == len(header) for row in rows)
    assert sum(row.count("-") for row in rows) == 1


def test_figures_that_rest_on_an_unfaithful_twin_are_marked(report: Report) -> None:
    assert report.fidelity is not None and "INVALID" not in section(report)
    spoilt = report.model_copy(
        update={
            "fidelity": report.fidelity.model_copy(update={"valid": False}),
            "robustness": [c.model_copy(update={"valid": c.surrogate != "twin"}) for c in report.robustness],
        }
    )
    rows = matrix_rows(spoilt)[1]
    assert [all(cell.endswith(" INVALID") for cell in row[1:]) for row in rows] == [
        row[0].startswith("twin") for row in rows
    ]
    assert "Figures of attacks made on it are INVALID" in section(spoilt)


def test_what_was_not_run_stands_beside_the_figure(report: Report) -> None:
    worst = WorstCase(attacks="fast", passes=[], complete=False, not_run=["pgd-5 on twin"])
    cut = report.model_copy(update={"worst_case": worst})
    figure = robust_text(report.robust_accuracy.deployed, cut)
    assert figure.endswith(" UNFINISHED")
    assert figure in render_summary(cut, Path("out")) and render_markdown(cut).count(" UNFINISHED") == 4
    assert "Not run, so that robust accuracy may be lower: pgd-5 on twin" in section(cut)
    assert "UNFINISHED" not in render_markdown(report) + render_summary(report, Path("out"))


def test_a_pass_is_told_with_the_graph_that_it_was_made_for(report: Report) -> None:
    passes = [
        PassRecord(attack="apgd-t", steps=20, ranks=[1], surrogate="float", graphs=["deployed"], attempted=9, fooled=2),
        PassRecord(attack="apgd-t", steps=20, ranks=[2, 3], surrogate="float", graphs=["fp32"], attempted=7, fooled=1),
        PassRecord(attack="square", steps=200, ranks=[], surrogate=None, graphs=["deployed"], attempted=6, fooled=0),
    ]
    passes.append(passes[-1].model_copy(update={"steps": 900, "onward": True, "attempted": 3}))
    told = report.model_copy(update={"worst_case": report.worst_case.model_copy(update={"passes": passes})})
    assert pass_rows(told) == [
        ("apgd-t-20", "float network", "deployed", "1", "9", "2"),
        ("apgd-t-20", "float network", "float twin", "2 to 3", "7", "1"),
        ("square-200", "the graph, by queries", "deployed", "any", "6", "0"),
        ("square-900 onward", "the graph, by queries", "deployed", "any", "3", "0"),
    ]


def test_the_schedule_in_words(report: Report) -> None:
    cell = report.robustness[0].model_copy(update={"attack": "pgd-5", "steps": 5, "step_size": 0.04, "total": 7})
    told = [
        plan_text(cell.model_copy(update=change))
        for change in (
            {"random_start": False},
            {"random_start": True},
            {"random_start": True, "restarts": 3},
            {"attack": "pgd-1", "steps": 1, "random_start": False},
        )
    ]
    assert told == [
        "pgd-5 in steps of 0.04 from the image itself, all steps on all 7 images",
        "pgd-5 in steps of 0.04 from one random start, all steps on all 7 images",
        "pgd-5 in steps of 0.04 from 3 random starts, the worst counts, all steps on all 7 images",
        "pgd-1 in one step of 0.04 from the image itself, all steps on all 7 images",
    ]


def test_only_tensors_that_clip_are_listed(report: Report) -> None:
    rows = [
        SaturationRecord(tensor="quiet", clean=0.0, attacked=1e-5),
        SaturationRecord(tensor="loud", clean=0.0, attacked=0.25),
    ]
    text = section(report.model_copy(update={"saturation": rows}))
    assert "| `loud` | 0.000% | 25.000% |" in text and "`quiet`" not in text and "2 tensors are" in text
    text = section(report.model_copy(update={"saturation": rows[:1]}))
    assert "No tensor has more than 0.01% clipped." in text


def test_no_line_of_a_table_is_too_wide_to_read(report: Report) -> None:
    quiet = report.model_copy(update={"soundness": []})  # an alarm stands beside every figure, however long
    assert max(len(line) for line in section(quiet).splitlines() if line.startswith("|")) <= 160
