"""`--engine inc` from the command line to the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.tiny import World, entries
from toolkit import cli
from toolkit.bundle import read_report
from toolkit.exporters.onnx import load_onnx, read_metadata
from toolkit.exporters.precision import layer_precision

pytest.importorskip("neural_compressor", reason="pip install -c constraints.txt '.[dev]'")
AS_IT_IS = ("--prune", "0.5", "--finetune", "none", "--no-end-to-end", "--threads", "1", "-q")


def test_harden_ships_what_the_engine_made(world: World, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with tiny.working_folder(world.folder):
        command = (*tiny.harden_arguments(output), *AS_IT_IS, "--engine", "inc", "--calibration", "40")
        assert tiny.run(*command, "--calibrate-adversarial", "0.25") == cli.DONE
    report = read_report(output)
    found = report.quantization
    assert (found.engine, found.calibration, found.integer_coverage) == ("neural-compressor", "minmax", 1.0)
    assert found.calibration_comparison is not None and found.calibration_comparison.adversarial_images == 7
    assert "Engine neural-compressor" in (output / "report.md").read_text()
    assert "engine: inc" in (output / "config.yaml").read_text()
    assert min(row.agreement.value for row in report.parity) > 0.9
    files = (output / "model.onnx", output / "model.fp32.onnx")
    layers = [[layer.name for layer in layer_precision(load_onnx(path))] for path in files]
    assert layers[0] == layers[1]


@pytest.mark.usefixtures("here")
def test_quantize_takes_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    for engine, name in (("inc", "neural-compressor"), ("ort", "onnxruntime")):
        command = ("quantize", "model.pt", "--data", "npz:data.npz", "--engine", engine, "--threads", "1")
        assert tiny.run(*command, "--output", f"{engine}.onnx", "--json", "-q") == cli.DONE
        found = json.loads(capsys.readouterr().out)
        assert (found["engine"], found["integer_coverage"]) == (name, 1.0)
        assert read_metadata(Path(f"{engine}.onnx"))["dataset"] == "npz:data.npz"


@pytest.mark.usefixtures("here")
def test_it_works_in_a_process_that_has_not_seen_the_engine_before_its_first_export() -> None:
    """Here, what tests imported has registered the engine's operators with torch long ago."""
    command = ("quantize", "model.pt", "--data", "npz:data.npz", "--engine", "inc", "--threads", "1", "-q")
    run = subprocess.run([sys.executable, "-m", "toolkit", *command, "--json"], capture_output=True, text=True)
    assert run.returncode == cli.DONE, run.stderr
    assert json.loads(run.stdout)["integer_coverage"] == 1.0


def test_quantize_says_that_a_file_alone_is_not_enough(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run("export", "model.pt", "--data", "npz:data.npz", "--output", "float.onnx", "-q") == cli.DONE
    capsys.readouterr()
    before = entries(here)
    command = ("quantize", "float.onnx", "--data", "npz:data.npz", "--engine", "inc", "--output", "int8.onnx", "-q")
    assert tiny.run(*command) == cli.BAD_INPUT
    assert "toolkit quantize MODEL.pt --engine inc" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert entries(here) == before


@pytest.mark.usefixtures("here")
def test_harden_refuses_a_method_that_the_engine_has_not_before_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    command = (*tiny.harden_arguments(), "--engine", "inc", "--calibrate", "percentile", "-q")
    assert tiny.run(*command) == cli.BAD_INPUT
    assert "does not have this calibration method" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.usefixtures("here")
def test_the_plan_names_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run(*tiny.harden_arguments(), "--engine", "inc", "--dry-run", "--json", "-q") == cli.DONE
    steps = [row["step"] for row in json.loads(capsys.readouterr().out)]
    assert "quantise   int8 by inc, minmax" in steps
