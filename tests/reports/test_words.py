"""report.md, the summary and the comparison: what they say agrees with report.json."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.tiny import World
from toolkit.artifacts import Proportion
from toolkit.bundle import read_report
from toolkit.config import GateConfig
from toolkit.evaluators.assignment import Assignment
from toolkit.evaluators.cost import IntegerCoverage
from toolkit.evaluators.judge import Drop
from toolkit.evaluators.latency import LatencyRow
from toolkit.evaluators.soundness import integer_above_float
from toolkit.evaluators.timing import Interval
from toolkit.paths import public_name
from toolkit.reports.build import _gates, verdict
from toolkit.reports.markdown import render_markdown
from toolkit.reports.schema import AlarmRecord, Assigned, Gate, Report, RoundingRecord, Share, Threat
from toolkit.reports.schema import Assignment as AssignmentRecord
from toolkit.reports.summary import comparison, render_summary, text_table
from toolkit.reports.words import percent, threat_text


@pytest.fixture
def report(hardened: World) -> Report:
    return read_report(hardened.bundle)


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def tables(text: str) -> list[list[str]]:
    """The lines of every table."""
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [block for block in blocks if block[0].startswith("|")]


def test_the_markdown_is_that_of_the_bundle_and_its_tables_are_whole(hardened: World, report: Report) -> None:
    text = render_markdown(report)
    assert text == (hardened.bundle / "report.md").read_text()
    assert len(tables(text)) >= 8
    for table in tables(text):
        assert len({line.count("|") for line in table}) == 1, table[0]
    assert "None" not in text and "nan" not in text


def test_every_headline_figure_stands_in_the_markdown_and_the_summary(report: Report) -> None:
    figures = [percent(report.accuracy.deployed), percent(report.robust_accuracy.deployed)]
    figures += [f"{report.model.params.after:,}", f"{report.model.macs.after:,}", report.quantization.verdict]
    for text in (render_markdown(report), render_summary(report, Path("out"))):
        for figure in figures:
            assert figure in text


def test_alarms_and_unmet_gates_cannot_be_overlooked(report: Report) -> None:
    (alarm,) = integer_above_float({"fp32": Proportion(10, 100), "deployed": Proportion(50, 100)})
    told = report.model_copy(
        update={
            "soundness": [AlarmRecord(name=alarm.name, message=alarm.message, value=alarm.value, limit=alarm.limit)],
            "gates": [Gate(name="--min-robust", limit=0.9, value=0.5, met=False)],
        }
    )
    markdown, summary = render_markdown(told), render_summary(told, Path("out"))
    assert "**ALARM integer_above_float**" in markdown.split("##")[0], "before the first section"
    assert "ALARM" in summary and "GATE     --min-robust 0.9: measured 0.5000, NOT MET" in summary
    assert "**not met**" in markdown


@pytest.mark.parametrize(("deployed", "told"), [(603, False), (600, False), (595, False), (583, True)])
def test_what_the_search_of_integer_layers_cannot_see_is_told_beside_it(
    report: Report, deployed: int, told: bool
) -> None:
    side = Assigned(ratio=0.8, ratio_low=0.7, ratio_high=0.9, accuracy_drop=0.0, robust_drop=0.0)
    found = AssignmentRecord(
        keep_float=[], for_accuracy=[], max_drop=0.005, images=60, tried=1, shipped=side, all_integer=side, pays=True
    )
    robust = report.robust_accuracy.model_copy(
        update={name: Share.of(Proportion(n, 1000)) for name, n in (("fp32", 600), ("deployed", deployed))}
    )
    quantization = report.quantization.model_copy(update={"assignment": found})
    text = render_markdown(report.model_copy(update={"quantization": quantization, "robust_accuracy": robust}))
    verb = "gains" if deployed > 600 else "loses"
    assert f"{verb} {abs(600 - deployed) / 10:.2f} points of robust accuracy" in text
    assert ("That is more than was allowed" in text) == told


def test_the_price_of_the_graph_that_accuracy_forbade_is_told(report: Report) -> None:
    side = Assigned(ratio=0.8, ratio_low=0.7, ratio_high=0.9, accuracy_drop=0.001, robust_drop=0.0101)
    facts = {"max_drop": 0.005, "images": 60, "tried": 1, "shipped": side, "all_integer": side, "pays": True}

    def text(*layers: str) -> str:
        found = AssignmentRecord.model_validate({"keep_float": list(layers), "for_accuracy": list(layers), **facts})
        quantization = report.quantization.model_copy(update={"assignment": found})
        return render_markdown(report.model_copy(update={"quantization": quantization}))

    assert "`--max-drop 0.011` allows what all layers in integers lose here" in text("node_conv2d")
    assert "`--max-drop 0.011`" not in text()


def test_the_sensitivity_of_every_layer_is_told(report: Report) -> None:
    side = Assigned(ratio=0.8, ratio_low=0.7, ratio_high=0.9, accuracy_drop=0.001, robust_drop=0.0101)
    facts = {"max_drop": 0.005, "images": 60, "tried": 1, "shipped": side, "all_integer": side, "pays": True}
    rows = [
        {"layer": "harmless", "relief": -0.02, "accuracy_drop": None, "robust_drop": None},
        {"layer": report.quantization.layers[0].layer, "relief": 0.61, "accuracy_drop": 0.001, "robust_drop": 0.0123},
    ]

    def text(**more: Any) -> str:
        found = AssignmentRecord.model_validate(
            {"keep_float": [], "for_accuracy": [], **facts, "sensitivity": rows, **more}
        )
        quantization = report.quantization.model_copy(update={"assignment": found})
        return render_markdown(report.model_copy(update={"quantization": quantization}))

    lines = text(margin_images=40).splitlines()
    told = [line for line in lines if "harmless" in line or "+1.23" in line]
    assert [cell.strip() for cell in told[0].split("|")[2:6]] == ["61%", "+0.10", "+1.23", "integers"]
    assert [cell.strip() for cell in told[1].split("|")[2:6]] == ["-2%", "not measured", "not measured", "float"]
    assert "of the margins of 40 attacked images" in text(margin_images=40) and "of the clean logits" in text()
    doubted, trusted = (section(text(foreign_load=load), "Which layers are integer") for load in (0.3, 0.02))
    assert "other processes took 30% of the CPU time" in doubted and "TRUSTED" not in trusted


def test_widths_that_were_timed_on_a_busy_machine_are_doubted(report: Report) -> None:
    row = RoundingRecord(
        round_to=8, macs=1, ratio=1, ratio_low=1, ratio_high=1, float_ratio=1, per_mac=1, graph="float", admitted=True,
        chosen=True,
    )  # fmt: skip

    def text(load: float) -> str:
        model = report.model.model_copy(update={"roundings": [row], "roundings_foreign_load": load})
        return section(render_markdown(report.model_copy(update={"model": model})), "Widths")

    assert "other processes took 50% of the CPU time" in text(0.5) and "TRUSTED" not in text(0.01)


def test_a_verdict_doubts_a_choice_that_was_made_on_a_busy_machine() -> None:
    interval = Interval(0.5, 0.4, 0.6)

    def said(load: float, int8: bool) -> str:
        found = Assignment((), interval, interval, Drop(0, 0), Drop(0, 0), 60, 1, foreign_load=load)
        row = LatencyRow("deployed", "cpu", 1, 1, 1, 1, 1, 1, 1, 6, "fp32", 0.5, 0.4, 0.6, foreign_load=0.0)
        return verdict(int8, IntegerCoverage("cpu", 1, 1, (), 1.0, {}, ()), (row,), found)

    lossy = Assignment((), interval, interval, Drop(0, 0.02), Drop(0, 0), 60, 1, max_drop=0.01)
    row = LatencyRow("deployed", "cpu", 1, 1, 1, 1, 1, 1, 1, 6, "fp32", 0.5, 0.4, 0.6, foreign_load=0.0)
    coverage = IntegerCoverage("cpu", 1, 1, (), 1.0, {}, ())
    assert "int8 pays here; whatever the layers, it loses more" in verdict(True, coverage, (row,), lossy)
    assert verdict(False, coverage, (row,), lossy).startswith("float: whatever the layers, int8 loses more accuracy")
    assert "int8 pays here (which layers are integer was chosen while other processes used the CPU" in said(0.3, True)
    assert "as far as can be told while other processes use the CPU" in said(0.3, False)
    assert not any("other processes" in said(0.01, int8) for int8 in (True, False))


def test_the_summary_ends_with_places_and_commands(report: Report) -> None:
    summary = render_summary(report, Path("some/out"))
    commands = ("verify some/out", "attack some/out", "harden --config some/out/config.yaml --output some/out-again")
    for line in ("bundle:  some/out", "report:  some/out/report.md", *(f"toolkit {command}" for command in commands)):
        assert line in summary


def test_the_threat_in_words() -> None:
    pixel = Threat(preset="pixel", norm="linf", eps=0.1, space="pixels", clip=True)
    paper = Threat(preset="paper", norm="l2", eps=0.5, space="normalised", clip=False)
    assert threat_text(pixel) == "l-inf, eps 0.1 in pixels in [0, 1], clipped to valid pixels (preset `pixel`)"
    assert threat_text(paper) == "l2, eps 0.5 in the normalised space, not clipped to valid pixels (preset `paper`)"
    assert threat_text(pixel.model_copy(update={"norm": "l1", "eps": 12.0})).startswith("l1, eps 12")


def test_a_comparison_has_a_row_for_each_bundle(report: Report) -> None:
    header, rows = comparison({"a": report, "b": report})
    assert [row[0] for row in rows] == ["a", "b"] and all(len(row) == len(header) for row in rows)


def test_a_text_table_is_aligned() -> None:
    lines = text_table(("name", "n"), [("a", 1), ("longer", 22)]).splitlines()
    assert lines == ["name    n", "------  --", "a       1", "longer  22"]


def row(low: float, high: float, batch: int = 1, *, trusted: bool = True) -> Any:
    middle = (low + high) / 2
    fields = {"ratio": middle, "ratio_low": low, "ratio_high": high, "speedup": 1 / middle}
    fields |= {"speedup_low": 1 / high, "speedup_high": 1 / low, "foreign_load": 0.4}
    return SimpleNamespace(file="deployed", batch=batch, trusted=trusted, **fields)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((row(0.4, 0.6), row(0.5, 0.9)), "int8 pays here"),
        ((row(1.1, 1.2), row(1.01, 1.5)), "does NOT pay here"),
        ((row(0.4, 0.6), row(1.1, 1.2, batch=64)), "pays at batch 1 only"),
        ((row(0.4, 0.6, batch=64), row(0.9, 1.2)), "pays at batch 64 only"),
        ((row(0.9, 1.2), row(1.1, 1.2, batch=64)), "does NOT pay here: slower at batch 64, and no difference"),
        ((), "speed was not measured"),
    ],
)
def test_the_verdict_on_speed(rows: tuple[Any, ...], words: str) -> None:
    coverage: Any = SimpleNamespace(share=0.995)
    said = verdict(True, coverage, rows)
    assert words in said and said.startswith("99.5% of the multiply-accumulates")


def test_the_verdict_on_16_bit_activations_says_that_they_run_in_float() -> None:
    coverage: Any = SimpleNamespace(share=0.0)
    said = verdict(True, coverage, (row(1.1, 1.2),), activation_bits=16)
    assert said.startswith(
        "0.0% of the multiply-accumulates run in integers (ONNX Runtime has no kernel that multiplies"
    )
    assert "int16 does NOT pay here" in said and "int8" not in said


def test_a_difference_within_the_noise_is_no_verdict() -> None:
    coverage: Any = SimpleNamespace(share=1.0)
    said = verdict(True, coverage, (row(0.9, 1.1),))
    assert "no difference" in said and "pays" not in said


def test_a_machine_that_others_used_gives_no_verdict_on_speed() -> None:
    coverage: Any = SimpleNamespace(share=1.0)
    said = verdict(True, coverage, (row(0.4, 0.6, trusted=False),))
    assert "speed cannot be told: other processes" in said and "pays" not in said


def test_gates_are_met_at_their_limit() -> None:
    gates = GateConfig(min_accuracy=0.5, min_robust=0.25, min_integer_coverage=1.0)
    found = _gates(gates, Proportion(1, 4), Proportion(1, 2), 1.0)
    assert [(gate.name, gate.met) for gate in found] == [
        ("--min-accuracy", True), ("--min-robust", True), ("--min-integer-coverage", True),
    ]  # fmt: skip
    assert not any(gate.met for gate in _gates(gates, Proportion(0, 4), Proportion(0, 2), 0.99))
    assert _gates(GateConfig(), Proportion(1, 4), Proportion(1, 2), 1.0) == []


@pytest.mark.parametrize("path", ["/home/me/net.py:net", "net.py:net", "C:\\code\\net.py:net", "a/b/net.py:net"])
def test_an_architecture_is_named_without_its_folder(path: str) -> None:
    assert public_name(path) == "net.py:net"
    assert public_name("torchvision:resnet18") == "torchvision:resnet18"
