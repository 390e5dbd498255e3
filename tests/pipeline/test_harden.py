from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests import tiny
from tests.tiny import World, repeatable, report_of
from toolkit import cli
from toolkit.config import HardenConfig, build, read_settings
from toolkit.training.run import Run


def test_the_bundles_own_config_repeats_the_run(hardened: World, out: Path) -> None:
    assert tiny.run("harden", "--config", out / "config.yaml", "--output", "again", "-q") == cli.DONE
    assert repeatable(report_of(Path("again"))) == repeatable(report_of(hardened.bundle))
    for name in ("model.onnx", "model.fp32.onnx", "model.e2e.onnx", "config.yaml"):
        assert Path("again", name).read_bytes() == (hardened.bundle / name).read_bytes(), name


def test_a_flag_wins_over_the_config(out: Path) -> None:
    command = ("harden", "--config", out / "config.yaml", "--epochs", "0", "--prune", "0", "--steps", "1", "-q")
    assert tiny.run(*command, "--output", "again") == cli.DONE
    saved = yaml.safe_load(Path("again/config.yaml").read_text())
    assert (saved["finetune"]["epochs"], saved["prune"]["ratio"], saved["threat"]["steps"]) == (0, 0.0, 1)
    report = report_of(Path("again"))
    assert report["model"]["params"]["before"] == report["model"]["params"]["after"]
    assert report["finetuning"]["epochs"] == []


def test_the_written_config_is_resolved(hardened: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hardened.folder)
    config = build(HardenConfig, read_settings(hardened.bundle / "config.yaml"))
    assert config.data.source == "npz:data.npz"
    assert None not in (config.threat.eps, config.threat.steps, config.threat.step_size, config.threat.random_start)
    assert config.threads == 1 and config.seed == 0


def test_a_hardened_network_can_be_hardened_again(out: Path) -> None:
    command = tiny.harden_arguments("twice", model=str(out / "model.pt"), epochs=0)
    assert tiny.run(*command, "--threads", "1", "-q") == cli.DONE
    content = torch.load("twice/model.pt", weights_only=True)
    assert len(content["spec"]["pruning"]) == 2
    assert report_of(Path("twice"))["model"]["params"]["before"] == report_of(out)["model"]["params"]["after"]


def test_a_float_bundle_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [item for item in tiny.harden_arguments(epochs=0) if item != "--int8"]
    assert tiny.run(*command, "-q") == cli.BAD_INPUT
    assert tiny.run(*command, "--allow-float", "--no-end-to-end", "--threads", "1", "-q") == cli.DONE
    found = report_of(here / "out")["quantization"]
    assert found["verdict"].startswith("float") and found["engine"] == "none"
    assert found["integer_coverage"] == 0 and found["input_range"] is None
    assert not Path("out/model.e2e.onnx").exists()
    assert tiny.run("verify", "out", "-q") == cli.DONE
    report = report_of(here / "out")
    assert {row["surrogate"] for row in report["robustness"]} == {"original", "float"}
    assert report["fidelity"] is None and report["saturation"] == [] and report["quantization"]["clipped_share"] is None
    capsys.readouterr()
    assert tiny.run("attack", "out", "--attacks", "pgd", "--n", "20", "--threads", "1", "-q") == cli.DONE
    page = capsys.readouterr().out
    assert "float network" in page and "fake-quantised" not in page and "twin of the deployed" not in page


def test_a_quantisation_aware_run_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*tiny.harden_arguments(precision="auto"), "--qat", "--keep-float", "node_linear", "--threads", "1"]
    assert tiny.run(*command, "--dry-run") == cli.DONE
    assert "2 epoch(s) of 540 images, quantisation-aware" in capsys.readouterr().out
    assert tiny.run(*command, "-q") == cli.DONE
    report = report_of(here / "out")
    assert report["finetuning"]["qat"] and report["finetuning"]["best_epoch"] == 2
    assert report["quantization"]["learnt_ranges"] >= 2 and report["quantization"]["integer_coverage"] > 0.5
    page = Path("out/report.md").read_text()
    assert (
        "Quantisation-aware: its last 50% (epochs before that are not kept) computed" in page
        and "whose ranges fine-tuning learnt" in page
    )
    assert yaml.safe_load(Path("out/config.yaml").read_text())["finetune"]["qat"] is True
    again = [*tiny.harden_arguments("twice", model="out/model.pt", epochs=0), "--threads", "1", "-q"]
    assert tiny.run(*again) == cli.DONE  # the checkpoint is an ordinary network
    assert not report_of(Path("twice"))["finetuning"]["qat"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "more",
    [["--epochs", "0"], ["--per-tensor"], ["--finetune", "none"], ["--engine", "inc"], ["--activation-bits", "16"]],
)
def test_what_a_quantisation_aware_run_cannot_be(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run(*tiny.harden_arguments(), "--qat", *more, "-q") == cli.BAD_INPUT
    assert "--qat" in capsys.readouterr().err and not Path("out").exists()


def test_the_pruned_network_learns_from_a_teacher(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*tiny.harden_arguments(epochs=1), "--finetune", "distill", "--threads", "1"]
    assert tiny.run(*command, "--dry-run", "-q") == cli.BAD_INPUT
    assert "distillation needs a teacher" in capsys.readouterr().err
    assert tiny.run(*command, "--teacher", "model.pt", "-q") == cli.DONE
    assert yaml.safe_load(Path("out/config.yaml").read_text())["finetune"]["teacher"] == "../model.pt"
    assert report_of(here / "out")["finetuning"]["objective"] == "distill"


def test_a_network_that_cannot_be_exported_is_refused_before_it_is_trained(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "net.py").write_text(
        "from layers import *\n"
        "class Branching(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x * 2 if x.sum() > 0 else x\n"
        "def net(num_classes, in_channels):\n"
        "    layers = [*convolution(in_channels, 16), Branching()]\n"
        "    return nn.Sequential(*layers, *convolution(16, 32)[:1], nn.Flatten(), nn.Linear(512, num_classes))\n"
    )
    shutil.rmtree(here / "__pycache__", ignore_errors=True)
    torch.save(_state_of(here / "net.py"), here / "other.pt")
    before = tiny.entries(here)
    monkeypatch.setattr(Run, "advance", lambda _run: pytest.fail("it was trained"))
    command = tiny.harden_arguments(model="other.pt")
    assert tiny.run(*command, "--prune", "0", "--arch", "net.py:net", "--data", "npz:data.npz", "-q") == cli.BAD_INPUT
    err = capsys.readouterr().err
    assert "export" in err and "x.sum() > 0" in err, err
    assert [name for name in tiny.entries(here) if name != "__pycache__"] == before


def _state_of(path: Path) -> dict[str, Any]:
    from toolkit.models.registry import build_network

    return build_network(f"{path}:net", tiny.CLASSES, (1, 16, 16)).state_dict()


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_provider_that_is_not_there_is_refused_before_training(
    more: tuple[str, ...], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the provider")
    monkeypatch.setattr(Run, "advance", lambda _run: pytest.fail("it was trained"))
    assert tiny.run(*tiny.harden_arguments(), "--provider", "cuda", *more, "-q") == cli.BAD_INPUT
    assert "cuda" in capsys.readouterr().err.lower()
    assert not any("out" in name for name in tiny.entries(here))


def test_a_diverged_training_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*tiny.harden_arguments(), "--learning-rate", "1e30", "-q"]
    assert tiny.run(*command) == cli.BAD_INPUT
    assert "diverged" in capsys.readouterr().err
    assert not any("out" in name for name in tiny.entries(here))
