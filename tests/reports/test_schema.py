from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.tiny import World
from toolkit.artifacts import Proportion
from toolkit.reports.schema import SCHEMA_VERSION, Report, Share, schema_text

DOCUMENT = Path(__file__).parents[2] / "docs/report.schema.json"


@pytest.fixture
def report(hardened: World) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((hardened.bundle / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = json.loads(DOCUMENT.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_schema_in_the_documentation_is_that_of_the_code() -> None:
    command = "from toolkit.reports.schema import schema_text; print(schema_text(), end='')"
    assert DOCUMENT.read_text() == schema_text(), f'python -c "{command}" > docs/report.schema.json'


def test_a_real_report_is_valid(report: dict[str, Any], validator: Any) -> None:
    validator.validate(report)
    assert report["schema_version"] == SCHEMA_VERSION
    assert json.loads(Report.model_validate(report).model_dump_json()) == report


def test_it_holds_at_least_what_is_promised(report: dict[str, Any]) -> None:
    assert {"params", "macs", "bytes"} <= set(report["model"])
    assert set(report["accuracy"]) == {"torch", "fp32", "deployed"}
    assert set(report["robust_accuracy"]) == {"fp32", "deployed", "deployed_from_file"}
    row = report["robustness"][0]
    wanted = {"attack", "threat", "surrogate", "target", "correct", "total", "value", "low", "high", "transfer_rate"}
    assert wanted <= set(row)
    assert {row["target"] for row in report["robustness"]} == {"torch", "fp32", "deployed", "deployed_unoptimised"}
    for part in ("columns", "soundness_checks", "saturation", "security_curve", "step_ladder"):
        assert report[part], part
    assert {"attacks", "passes", "complete", "not_run"} == set(report["worst_case"])
    timing = {"file", "provider", "batch", "threads", "p50", "p90", "p99", "throughput", "ratio", "speedup"}
    assert timing <= set(report["latency"][0])
    assert {"engine", "integer_coverage", "layers", "verdict"} <= set(report["quantization"])
    stages = {"load", "prune", "finetune", "export", "quantize", "evaluate", "benchmark"}
    assert stages <= set(report["timings"])
    assert {(row["graph"], row["batch_size"]) for row in report["parity"]} == {
        (graph, size) for graph in ("fp32", "deployed") for size in (1, 7, 64)
    }


def test_every_accuracy_is_a_wilson_interval(report: dict[str, Any]) -> None:
    def check(part: Any) -> int:
        if isinstance(part, list):
            return sum(map(check, part))
        if not isinstance(part, dict):
            return 0
        own = 0
        if {"correct", "total"} <= set(part):
            expected = Proportion(part["correct"], part["total"]).as_dict()
            assert {name: part[name] for name in expected} == expected
            own = 1
        return own + sum(check(value) for value in part.values())

    assert check(report) >= 15


def test_parts_add_up(report: dict[str, Any]) -> None:
    quantization = report["quantization"]
    assert sum(row["macs"] for row in quantization["layers"]) == quantization["macs_total"]
    assert sum(row["macs"] for row in quantization["layers"] if row["integer"]) == quantization["macs_integer"]
    assert quantization["integer_coverage"] == quantization["macs_integer"] / quantization["macs_total"]
    for quantity in ("parameters", "macs"):
        total = report["model"]["params" if quantity == "parameters" else "macs"]
        for when in ("before", "after"):
            assert sum(layer[quantity][when] for layer in report["model"]["layers"]) == total[when]
    for row in report["latency"]:
        assert row["p50"] <= row["p90"] <= row["p99"]
        assert row["speedup"] == pytest.approx(1 / row["ratio"])
        assert row["ratio_low"] <= row["ratio_high"]
    digests = {report["data"][part]["sha256"] for part in ("train", "calibration", "validation", "evaluation")}
    assert len(digests) == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda report: report.pop("soundness"),
        lambda report: report.update(surprise=1),
        lambda report: report.update(schema_version="0.9"),
        lambda report: report["accuracy"]["deployed"].update(value=1.01),
        lambda report: report["robustness"][0].update(surrogate="somebody"),
        lambda report: report["robustness"][0].update(transfer_rate="none"),
    ],
)
def test_the_schema_refuses_what_is_no_report(report: dict[str, Any], validator: Any, spoil: Any) -> None:
    spoilt = copy.deepcopy(report)
    spoil(spoilt)
    assert not validator.is_valid(spoilt)
    with pytest.raises(ValueError, match="validation error"):
        Report.model_validate(spoilt)


def test_a_share_is_its_proportion() -> None:
    assert Share.of(Proportion(3, 4)).model_dump() == Proportion(3, 4).as_dict()
