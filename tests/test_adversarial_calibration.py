"""`--calibrate-adversarial` from the command line to the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.tiny import World, entries
from toolkit import cli
from toolkit.bundle import read_report
from toolkit.reports.markdown import render_markdown
from toolkit.reports.schema import Report

FLAG = ("--calibrate-adversarial", "0.25")
AS_IT_IS = ("--prune", "0", "--finetune", "none", "--no-end-to-end", "--threads", "1", "-q")


@pytest.fixture(scope="module")
def report(world: World, tmp_path_factory: pytest.TempPathFactory) -> Report:
    output = tmp_path_factory.mktemp("calibrated") / "out"
    with tiny.working_folder(world.folder):
        assert tiny.run(*tiny.harden_arguments(output), *AS_IT_IS, "--calibration", "40", *FLAG) == cli.DONE
    found: Report = read_report(output)
    assert render_markdown(found) == (output / "report.md").read_text()
    return found


def test_harden_measures_whether_attacked_calibration_images_help(report: Report) -> None:
    found = report.quantization.calibration_comparison
    assert found is not None
    assert (found.share, found.adversarial_images) == (0.25, report.quantization.calibration_images // 4)
    assert found.attack == "pgd-5"
    for side in (found.adversarial, found.plain):
        assert side.accuracy.total == side.robust_accuracy.total == report.data.validation.images
        assert side.robust_accuracy.correct <= side.accuracy.correct
        assert side.clipped_clean is not None and side.clipped_attacked is not None
    for test, first, second in (
        (found.accuracy_test, found.adversarial.accuracy, found.plain.accuracy),
        (found.robust_test, found.adversarial.robust_accuracy, found.plain.robust_accuracy),
    ):
        assert test.only_first - test.only_second == first.correct - second.correct


@pytest.mark.parametrize(
    ("verdict", "words"),
    [("helps", "keep the flag"), ("hurts", "leave"), ("trades", "choose"), ("no_difference", "No difference")],
)
def test_the_report_recommends(report: Report, verdict: str, words: str) -> None:
    found = report.quantization.calibration_comparison
    assert found is not None
    judged = report.quantization.model_copy(
        update={"calibration_comparison": found.model_copy(update={"verdict": verdict})}
    )
    text = render_markdown(report.model_copy(update={"quantization": judged}))
    section = text.split("## Attacked images in calibration")[1].split("\n## ")[0]
    assert f"{found.adversarial_images} calibration images (25%)" in section and words in section
    for share in (found.adversarial.robust_accuracy, found.plain.accuracy):
        assert f"{share.value:.2%} [{share.low:.2%}, {share.high:.2%}] (n={share.total})" in section


def test_what_was_not_counted_is_said(report: Report) -> None:
    found = report.quantization.calibration_comparison
    assert found is not None
    side = found.plain.model_copy(update={"clipped_clean": None, "clipped_attacked": None})
    judged = report.quantization.model_copy(update={"calibration_comparison": found.model_copy(update={"plain": side})})
    assert render_markdown(report.model_copy(update={"quantization": judged})).count("not counted") == 2


def test_without_the_flag_nothing_is_compared(hardened: World) -> None:
    found = read_report(hardened.bundle)
    assert found.quantization.calibration_comparison is None
    assert "Attacked images in calibration" not in render_markdown(found)


@pytest.mark.usefixtures("here")
def test_the_plan_names_the_share(capsys: pytest.CaptureFixture[str]) -> None:
    plans: list[list[dict[str, Any]]] = []
    for more in ((), FLAG):
        assert tiny.run(*tiny.harden_arguments(), *more, "--dry-run", "--json", "-q") == cli.DONE
        plans.append(json.loads(capsys.readouterr().out))
    steps = [next(row["step"] for row in plan if row["step"].startswith("quantise")) for plan in plans]
    assert steps == ["quantise   int8, minmax", "quantise   int8, minmax, 25% of the images attacked"]


def test_an_onnx_file_alone_cannot_be_attacked_for_calibration(
    out: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = entries(here)
    command = ("quantize", out / "model.fp32.onnx", "--data", "npz:data.npz", "--output", "int8.onnx", "-q", *FLAG)
    assert tiny.run(*command) == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "needs the torch network" in said and "toolkit harden" in said
    assert entries(here) == before


@pytest.mark.usefixtures("here")
def test_a_share_beyond_all_images_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run(*tiny.harden_arguments(), "--calibrate-adversarial", "1.5", "-q") == cli.BAD_INPUT
    assert "--calibrate-adversarial has no usable value" in capsys.readouterr().err
