from __future__ import annotations

from typing import Any

from toolkit.artifacts import Proportion
from toolkit.reports.schema import ProviderCoverage, Share, TargetFile
from toolkit.reports.targets import coverage_text, target_cells, targets_section, untested_words

FIELDS: dict[str, Any] = {
    "file": "model.fp16.onnx",
    "target": "cuda",
    "precision": "float16 of the float twin",
    "bytes": 1000,
    "accuracy": Share.of(Proportion(9, 10)),
    "robust_accuracy": Share.of(Proportion(4, 10)),
    "attacked_on": ["float", "twin"],
    "agreement": Share.of(Proportion(10, 10)),
    "relative": 0.001,
    "integer_coverage": 0.0,
    "largest_activation": 12.5,
    "tested_on": ["cpu"],
    "untested": {"cuda": "no GPU"},
}


def test_a_file_that_was_not_run_where_it_is_for_says_so_everywhere() -> None:
    file = TargetFile(**FIELDS)
    page = targets_section([file])
    assert "UNTESTED on cuda" in target_cells([file])[0][-1]
    words = untested_words(file)
    assert words.startswith("model.fp16.onnx is UNTESTED on cuda (no GPU)") and words in page
    assert "PGD is made on float and twin" in page and "Largest activation on calibration images: 12.5" in page


def test_a_file_that_was_run_there_is_not_called_untested() -> None:
    file = TargetFile(**{**FIELDS, "tested_on": ["cpu", "cuda"], "untested": {}, "robust_accuracy": None})
    page = targets_section([file])
    assert "UNTESTED" not in page and target_cells([file])[0][-1] == "cpu, cuda" and untested_words(file) == ""
    assert "not measured" in page and "PGD is made" not in page


def test_no_files_make_no_section() -> None:
    assert targets_section([]) == ""


def test_coverage_is_told_by_provider() -> None:
    rows = [
        ProviderCoverage(provider="cpu", integer_coverage=0.95, untested=None),
        ProviderCoverage(provider="cuda", integer_coverage=None, untested="no GPU"),
    ]
    found: Any = type("Found", (), {"coverage": rows})
    assert coverage_text(found) == "Integer coverage by provider: cpu 95.0%; cuda untested (no GPU)."
    found.coverage = []
    assert coverage_text(found) == ""
