"""`--target` and `--activation-bits` through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests import tiny
from tests.tiny import QUICK, entries
from toolkit import bundle, cli, targets
from toolkit.evaluators.saturating_layers import saturates_here
from toolkit.exporters.onnx import read_metadata
from toolkit.exporters.parity import Parity
from toolkit.reports.schema import Report

HARDEN = ("harden", "model.pt", "--prune", "0", "--finetune", "none", "--attacks", "pgd", *QUICK, "-q")
QUANTIZE = ("quantize", "net.fp32.onnx", "--data", "npz:data.npz", "--output", "net.onnx")


@pytest.fixture(scope="module")
def wide(world: tiny.World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with 16-bit activations and files for both other runtimes; read only."""
    output = tmp_path_factory.mktemp("wide") / "out"
    with tiny.working_folder(world.folder):
        flags = ("--int8", "--activation-bits", "16", "--target", "tensorrt,cuda", "--threads", "1", "--output", output)
        assert tiny.run(*HARDEN, *flags) == cli.DONE
    return output


def test_a_bundle_holds_the_files_and_says_where_they_were_not_run(wide: Path) -> None:
    report = bundle.read_report(wide)
    assert {"model.trt.onnx", "model.fp16.onnx"} < set(entries(wide))
    assert all(finding.passed for finding in bundle.verify_files(wide))
    tensorrt, cuda = report.targets
    assert (tensorrt.file, tensorrt.attacked_on) == ("model.trt.onnx", ["float", "twin"])
    assert (cuda.file, cuda.attacked_on) == ("model.fp16.onnx", ["float"])
    assert "tensorrt" in tensorrt.untested and tensorrt.tested_on == ["cpu"]
    assert cuda.largest_activation is not None and tensorrt.largest_activation is None
    for file in report.targets:
        assert file.robust_accuracy is not None and file.robust_accuracy.correct <= file.accuracy.correct
        assert abs(file.accuracy.value - report.accuracy.fp32.value) < 0.05
        assert read_metadata(wide / file.file)["target"] == file.target
    summary = (wide / "report.md").read_text()
    assert "## Files for other runtimes" in summary and "model.trt.onnx is UNTESTED on tensorrt" in summary


def test_16_bit_activations_are_said_to_run_in_float(wide: Path) -> None:
    found = bundle.read_report(wide).quantization
    assert found.activations == "uint16 asymmetric" and found.integer_coverage == 0
    assert "no kernel that multiplies 16-bit activations" in found.verdict and found.assignment is None
    by_provider = {row.provider: row for row in found.coverage}
    assert set(by_provider) == {"cpu", "cuda", "tensorrt"}
    assert by_provider["cpu"].integer_coverage == 0 and by_provider["cpu"].untested is None
    assert by_provider["tensorrt"].integer_coverage is None and by_provider["tensorrt"].untested
    assert "Integer coverage by provider: cpu 0.0%" in (wide / "report.md").read_text()


def test_the_bundle_can_be_verified_benchmarked_and_reported(
    wide: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.run("verify", wide, "-q") == cli.DONE
    assert tiny.run("benchmark", wide, "--rounds", "3", "--batch", "1", "--threads", "1", "-q") == cli.DONE
    assert tiny.run("attack", wide, "--attacks", "pgd", "--n", "30", "--threads", "1", "-q") == cli.DONE
    capsys.readouterr()
    assert here and tiny.run("report", wide) == cli.DONE
    assert "target:  model.trt.onnx" in capsys.readouterr().out


def test_a_report_without_the_new_parts_is_still_read(wide: Path) -> None:
    old = json.loads((wide / "report.json").read_text())
    del old["targets"], old["quantization"]["coverage"]
    found = Report.model_validate(old)
    assert found.targets == [] and found.quantization.coverage == []


def test_quantize_writes_them_beside_its_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run("export", "model.pt", "--output", "net.fp32.onnx", "-q") == cli.DONE
    command = (
        "quantize",
        "net.fp32.onnx",
        "--data",
        "npz:data.npz",
        "--target",
        "cuda,tensorrt",
        "--output",
        "net.onnx",
    )
    capsys.readouterr()
    assert tiny.run(*command, "--weight-bits", "4", "-q", "--json") == cli.DONE
    found = json.loads(capsys.readouterr().out)
    assert [file["file"] for file in found["targets"]] == ["net.fp16.onnx", "net.trt.onnx"]
    mixed = "int8 symmetric per channel; of linear layers int4 symmetric per channel"
    assert found["weights"] == (f"{mixed}, int8 ones of 7 bits" if saturates_here() else mixed)
    assert found["bytes"]["deployed"] == Path("net.onnx").stat().st_size and found["accuracy"]["fp32"]["total"] == 150
    assert {"net.onnx", "net.fp16.onnx", "net.trt.onnx"} < set(entries(here))
    assert not [name for name in entries(here) if name.startswith(".")]
    Path("net.onnx").unlink()
    assert tiny.run(*command, "-q") == cli.BAD_INPUT
    assert "net.fp16.onnx" in capsys.readouterr().err
    assert tiny.run(*command, "--force") == cli.DONE
    said = capsys.readouterr().out
    assert "net.trt.onnx is UNTESTED on tensorrt" in said and "accuracy: " in said and "size: " in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--target", "tensort"), "did you mean 'tensorrt'?"),
        (("--activation-bits", "4"), "can be simulated"),
        (("--weight-bits", "1"), "can be simulated"),
    ],
)
def test_bad_targets_and_bits_are_refused_before_anything_is_loaded(
    flags: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (("harden", "missing.pt", "--int8"), ("quantize", "missing.onnx", "--data", "sample")):
        assert tiny.run(*command, *flags, "-q") == cli.BAD_INPUT
        assert words in capsys.readouterr().err


def test_float16_that_computes_something_else_is_refused(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.run("export", "model.pt", "--output", "net.fp32.onnx", "-q") == cli.DONE
    monkeypatch.setattr(Parity, "relative", property(lambda _: 0.2))
    assert tiny.run(*QUANTIZE, "--target", "cuda", "-q") == cli.BAD_INPUT
    assert "this network needs float32" in capsys.readouterr().err
    assert "net.onnx" not in entries(here) and not [name for name in entries(here) if name.startswith(".net")]


def test_providers_that_run_nothing_here_are_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "why_no_cuda", lambda: "no GPU")
    assert targets.untested_providers() == {"cuda": "no GPU", "tensorrt": targets.NO_TENSORRT}
    monkeypatch.setattr(targets, "why_no_cuda", lambda: None)
    assert targets.untested_providers() == {"tensorrt": targets.NO_TENSORRT}


@pytest.mark.parametrize("saturates", [True, False])
def test_files_for_other_runtimes_are_judged_with_exact_sums(saturates: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, bool]] = []
    monkeypatch.setattr(targets, "saturates_here", lambda: saturates)
    monkeypatch.setattr(targets, "OnnxPredictor", lambda _, **how: asked.append(how))
    targets._exact_session(Path("model.trt.onnx"))
    assert asked == [{"optimized": not saturates}]


def test_seven_bits_are_for_this_kind_of_cpu_and_not_for_tensorrt(here: Path) -> None:
    assert tiny.run("export", "model.pt", "--output", "net.fp32.onnx", "-q") == cli.DONE
    assert tiny.run(*QUANTIZE, "--reduce-range", "--target", "tensorrt", "-q") == cli.DONE
    largest = {}
    for name in ("net.onnx", "net.trt.onnx"):
        constants = [numpy_helper.to_array(item) for item in onnx.load(here / name).graph.initializer]
        weights = [values for values in constants if values.dtype == np.int8 and values.ndim > 1]
        largest[name] = max(int(np.abs(values.astype(int)).max()) for values in weights)
    assert largest == {"net.onnx": 64, "net.trt.onnx": 127}
