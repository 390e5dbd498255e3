from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests import tiny
from tests.tiny import World, entries
from toolkit import bundle, cli
from toolkit.cli import app
from toolkit.errors import ToolkitError

COMMANDS = (
    "harden", "train", "prune", "export", "quantize", "attack", "benchmark", "report", "compare", "verify",
    "reproduce", "doctor",
)  # fmt: skip


def python(*arguments: str | Path, folder: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)


def files_in(folder: Path) -> set[str]:
    """Everything below a folder, hidden or not, but for Python's own cache."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    return {name for name in found if "__pycache__" not in name}


# Bad input


def nothing(_folder: Path) -> None:
    """No preparation."""


def truncated(folder: Path) -> None:
    content = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(content[: len(content) // 2])


def pickled(folder: Path) -> None:
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(256, 3)), folder / "module.pt")


def bare(folder: Path) -> None:
    torch.save(torch.load(folder / "model.pt", weights_only=True)["state_dict"], folder / "bare.pt")


def scripted(folder: Path) -> None:
    content = {"5.weight": torch.zeros(4, 512), "0.weight": torch.zeros(16, 1, 3, 3), "extra": torch.zeros(1)}
    torch.save(content, folder / "other.pt")


def pictures(folder: Path, *, classes: int = 3, parts: Sequence[str] = ("train", "test"), broken: int = 0) -> None:
    rng = np.random.default_rng(0)
    for part in parts:
        for label in range(classes):
            place = folder / "images" / part / str(label)
            place.mkdir(parents=True)
            for number in range(12):
                Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(place / f"{number}.png")
    for number in range(broken):
        (folder / f"images/train/0/{number}.png").write_bytes(b"\x89PNG no image")


def colour(folder: Path) -> None:
    rng = np.random.default_rng(0)
    parts = {"x_train": (60, 16, 16, 3), "x_test": (12, 16, 16, 3)}
    arrays = {name: rng.integers(0, 256, shape, dtype=np.uint8) for name, shape in parts.items()}
    np.savez(folder / "colour.npz", allow_pickle=False, **arrays, y_train=np.arange(60) % 3, y_test=np.arange(12) % 3)


def nothing_left(folder: Path) -> None:
    """All training images stand in the test part too."""
    archive = np.load(folder / "data.npz")
    x, y = archive["x_test"], archive["y_test"]
    np.savez(folder / "few.npz", allow_pickle=False, x_train=x, y_train=y, x_test=x, y_test=y)


UNTRACEABLE = """
import torch
from torch import nn

class Squeezing(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 256))
    def forward(self, x):
        logits = x.flatten(1) @ self.weight.T
        return logits + torch.linalg.svdvals(logits).sum()

def net(num_classes):
    return Squeezing()
"""


def untraceable(folder: Path) -> None:
    (folder / "odd.py").write_text(UNTRACEABLE)
    torch.save({"weight": torch.randn(3, 256)}, folder / "odd.pt")


def empty_classes(folder: Path) -> None:
    for part in ("train", "test"):
        (folder / f"images/{part}/a").mkdir(parents=True)


@dataclass(frozen=True)
class Bad:
    """A harden command with one thing wrong, and words that its message must hold."""

    arguments: tuple[str, ...]
    words: tuple[str, ...]
    prepare: Callable[[Path], object] = nothing
    model: str = "model.pt"


BAD: dict[str, Bad] = {
    "missing file": Bad((), ("not there", "nothing.pt"), model="nothing.pt"),
    "folder for a file": Bad((), ("folder",), lambda folder: (folder / "d").mkdir(), model="d"),
    "empty file": Bad((), ("empty", "0 bytes"), lambda folder: (folder / "model.pt").write_bytes(b"")),
    "truncated file": Bad((), ("truncated or no checkpoint",), truncated),
    "text for a checkpoint": Bad((), ("no checkpoint",), lambda f: (f / "model.pt").write_text("hello there")),
    "pickle without the flag": Bad(("--data", "npz:data.npz"), ("runs code", "--trust-pickle"), pickled, "module.pt"),
    "bare state without --arch": Bad(("--data", "npz:data.npz"), ("--arch",), bare, "bare.pt"),
    "bare state without --data": Bad(("--arch", "net.py:net"), ("--data",), bare, "bare.pt"),
    "state that does not fit": Bad(
        ("--data", "npz:data.npz", "--arch", "net.py:net"),
        ("do not fit", "missing: 0.bias", "unexpected: extra", "5.weight (4, 512)", "(3, 512)"),
        scripted,
        "other.pt",
    ),
    "unknown architecture": Bad(("--data", "npz:data.npz", "--arch", "cnn9"), ("cnn9", "did you mean 'cnn8'"), bare,
                                "bare.pt"),
    "unknown shipped network": Bad((), ("shipped network", "did you mean 'cnn8'"), model="shipped:cnn"),
    "unknown data set": Bad(("--data", "fashion-mnst"), ("fashion-mnst", "did you mean 'fashion-mnist'")),
    "data set without its kind": Bad(("--data", "data.npz"), ("npz:data.npz",)),
    "no such archive": Bad(("--data", "npz:nothing.npz"), ("no such file", "nothing.npz")),
    "no such folder": Bad(("--data", "folder:nothing"), ("no such folder", "nothing")),
    "folder without images": Bad(
        ("--data", "folder:images"),
        ("no images", "images"),
        empty_classes,
    ),
    "folder without parts": Bad(
        ("--data", "folder:images"), ("no train and test",), lambda folder: pictures(folder, parts=("x",))
    ),
    "one class": Bad(("--data", "folder:images"), ("class",), lambda folder: pictures(folder, classes=1)),
    "corrupt images": Bad(
        ("--data", "folder:images"), ("2 of 36 images", "0/0.png", "0/1.png"), lambda f: pictures(f, broken=2)
    ),
    "other class count": Bad(
        ("--data", "folder:images"), ("number of classes", "3 classes", "4"), lambda folder: pictures(folder, classes=4)
    ),
    "other channels": Bad(("--data", "npz:colour.npz"), ("number of channels", "grey", "RGB"), colour),
    "other size": Bad(("--data", "folder:images", "--size", "8"), ("size of images", "16x16", "8x8"), pictures),
    "ratio of one": Bad(("--prune", "1"), ("--prune", "1.0", "less than 1")),
    "negative ratio": Bad(("--prune", "-0.1"), ("--prune", "-0.1")),
    "eps in words": Bad(("--eps", "small"), ("--eps", "'small'")),
    "negative eps": Bad(("--eps", "-8/255"), ("--eps",)),
    "no eps at all": Bad(("--eps", "0"), ("--eps",)),
    "infinite eps": Bad(("--eps", "inf"), ("--eps",)),
    "eps over nothing": Bad(("--eps", "8/0"), ("--eps", "'8/0'")),
    "no preset for the data": Bad(("--eps", "0.1", "--threat", "paperr"), ("--threat", "paperr", "'paper'")),
    "batch in words": Bad(("--batch", "1,many"), ("--batch", "'many'")),
    "existing output": Bad((), ("exists", "--force"), lambda folder: (folder / "out").mkdir()),
    "output below a file": Bad(("--output", "net.py/out"), ("cannot be written", "net.py/out")),
    "output in a folder that takes none": Bad(("--output", "/proc/out"), ("cannot be written", "/proc/out")),
    "no data set here": Bad(("--data", "cifar10", "--data-dir", "empty"), ("CIFAR-10", "--data sample")),
    "unknown attack": Bad(("--attacks", "apgd-ce,sqare"), ("unknown attack", "'sqare'", "did you mean 'square'")),
    "an attack that the norm does not have": Bad(("--attacks", "cw"), ("cw", "l2")),
    "too many evaluation images": Bad(("--n", "151"), ("--n 151", "150 images")),
    "no images left": Bad(
        ("--data", "npz:few.npz"),
        ("no images are left for",),
        nothing_left,
    ),
    "nothing to prune away": Bad(("--prune", "0.01"), ("pruning removed nothing", "--round-to")),
    "no int8 and no leave to be float": Bad(("-",), ("float", "--int8", "--allow-float")),
    "nothing to resume": Bad(("--resume",), ("nothing to resume",)),
    "no such config": Bad(("--config", "nothing.yaml"), ("config file", "nothing.yaml")),
    "a config of other things": Bad(
        ("--config", "odd.yaml"), ("odd.yaml",), lambda folder: (folder / "odd.yaml").write_text("- 1\n")
    ),
    "unknown setting": Bad(
        ("--config", "odd.yaml"), ("prune.rato",), lambda folder: (folder / "odd.yaml").write_text("prune: {rato: 1}\n")
    ),
    "mean for other channels": Bad(
        ("--data", "npz:data.npz", "--arch", "net.py:net", "--mean", "0.1,0.2"), ("--mean", "2 values"), bare, "bare.pt"
    ),
    "a network without prunable layers": Bad(
        ("--data", "npz:data.npz", "--arch", "odd.py:net"), ("classifier was not found",), untraceable, "odd.pt"
    ),
    "a network that cannot be exported": Bad(
        ("--data", "npz:data.npz", "--arch", "odd.py:net", "--prune", "0"),
        ("exporter", "Squeezing"),
        untraceable,
        "odd.pt",
    ),
}  # fmt: skip


def unwrapped(panel: str) -> str:
    """The text of a panel without its frame and line breaks."""
    lines = [line.strip("│ \n") for line in panel.splitlines()]
    return " ".join(line for line in lines if line)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_with_its_fix_and_leaves_nothing(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = BAD[name]
    bad.prepare(here)
    before = files_in(here)
    command = [*tiny.harden_arguments(model=bad.model), "--threads", "1"]
    if bad.arguments == ("-",):
        command.remove("--int8")
    else:
        command += bad.arguments
    assert tiny.run(*command) == cli.BAD_INPUT
    captured = capsys.readouterr()
    said = unwrapped(captured.err)
    assert captured.out == ""
    assert "─ error ─" in captured.err and "found:" in said and "fix:" in said, captured.err
    for word in bad.words:
        assert word.replace(" ", "") in said.replace(" ", ""), f"{word} in {said}"
    assert "Traceback" not in captured.err
    assert files_in(here) == before


@pytest.mark.parametrize(
    "command",
    [
        ["hardenn"],
        ["harden", "model.pt", "--nothing"],
        ["harden", "model.pt", "--epochs", "many"],
        ["harden", "model.pt", "another.pt"],
        ["prune"],
        ["benchmark"],
        [],
    ],
)
def test_usage_errors(command: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_in(here)
    assert tiny.run(*command) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert "Usage: toolkit" in captured.err + captured.out and files_in(here) == before


def test_no_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run("harden", "--int8") == cli.BAD_INPUT
    assert "no model is named" in capsys.readouterr().err and "out" not in entries(here)


# Outcomes


def test_json_on_stdout_and_progress_on_stderr(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*tiny.harden_arguments(epochs=1), "--threads", "1", "--json"]
    assert tiny.run(*command) == cli.DONE
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((here / "out/report.json").read_text())
    assert "fine-tuning: done" in captured.err


def test_quiet_and_the_summary(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run(*tiny.harden_arguments(epochs=1), "--threads", "1", "-q") == cli.DONE
    captured = capsys.readouterr()
    assert captured.err == ""
    for line in ("accuracy, attacked", "bundle:  out", "report:  out/report.md", "toolkit verify out"):
        assert line in captured.out
    before = files_in(here)
    assert tiny.run(*tiny.harden_arguments(epochs=1), "-q") == cli.BAD_INPUT, "it exists now"
    assert files_in(here) == before


def test_unmet_gates_still_write_the_bundle(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gates = ("--min-accuracy", "0.5", "--min-robust", "0.999", "--min-integer-coverage", "0.99")
    assert tiny.run(*tiny.harden_arguments(epochs=0), "--threads", "1", *gates) == cli.GATE_UNMET
    out = capsys.readouterr().out
    assert "--min-robust 0.999: measured" in out and "NOT MET" in out
    report = json.loads((here / "out/report.json").read_text())
    assert [gate["met"] for gate in report["gates"]] == [True, False, True]
    assert "**not met**" in (here / "out/report.md").read_text()
    assert tiny.run("verify", "out", "--files-only") == cli.DONE


def test_a_defect_of_ours_says_so(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("toolkit.pipeline.build_report", lambda *_: 1 / 0)
    before = files_in(here)
    assert tiny.run(*tiny.harden_arguments(epochs=0), "--threads", "1", "-q") == cli.DEFECT
    err = capsys.readouterr().err
    assert "a defect of the toolkit: ZeroDivisionError" in err and "Traceback" not in err
    assert files_in(here) == before
    assert tiny.run(*tiny.harden_arguments(epochs=0), "--threads", "1", "-q", "-v") == cli.DEFECT
    assert "Traceback" in capsys.readouterr().err


def test_force_replaces_and_keeps_the_old_bundle_if_the_run_fails(
    out: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = (out / "report.json").read_bytes()
    command = [*tiny.harden_arguments(epochs=0), "--threads", "1", "-q", "--force"]
    with monkeypatch.context() as patch:
        patch.setattr("toolkit.pipeline.render_markdown", lambda _report: 1 / 0)
        assert tiny.run(*command) == cli.DEFECT
    assert (out / "report.json").read_bytes() == old and tiny.run("verify", "out", "--files-only", "-q") == cli.DONE
    assert tiny.run(*command) == cli.DONE
    assert (out / "report.json").read_bytes() != old
    assert not [name for name in entries(here) if name.startswith(".")]


def test_a_disk_that_fills_up(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_arguments: object, **_named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("toolkit.pipeline.write_settings", full)
    before = files_in(here)
    assert tiny.run(*tiny.harden_arguments(epochs=0), "--threads", "1", "-q") == cli.BAD_INPUT
    assert "the disk is full" in capsys.readouterr().err and files_in(here) == before


LIMITED = """
import resource, sys
from toolkit.cli import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(run(sys.argv[2:]))
"""


@pytest.mark.parametrize("limit", [4_000, 12_000])
def test_writes_that_the_system_refuses(limit: int, here: Path) -> None:
    """The kernel itself cuts files at `limit` bytes: the first that is written, or a later one."""
    before = files_in(here)
    command = [*tiny.harden_arguments(epochs=1), "--threads", "1", "-q"]
    done = python("-c", LIMITED, str(limit), *command, folder=here)
    assert done.returncode == cli.BAD_INPUT, done.stderr
    assert "the disk is full" in done.stderr and files_in(here) == before


def test_ctrl_c_says_how_to_resume_and_the_resume_completes(here: Path) -> None:
    before = files_in(here)
    command = [*tiny.harden_arguments("my bundle", epochs=80), "--finetune", "standard", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkit", *command], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    state = here / ".my bundle.partial/training.pt"
    until = time.monotonic() + 90
    while not state.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED, err
    assert out == "" and "Traceback" not in err
    assert "nothing was written to my bundle" in err and "--output 'my bundle'" in err and "--resume" in err
    left = files_in(here) - before
    assert left <= {".my bundle.partial", ".my bundle.partial/training.pt", ".my bundle.partial/training.pt.tmp"}
    assert tiny.run(*command, "--resume", "-q") == cli.DONE
    report = json.loads((here / "my bundle/report.json").read_text())
    assert len(report["finetuning"]["epochs"]) == 80 and ".my bundle.partial" not in entries(here)


# Commands beside harden


def test_verify_finds_a_changed_file(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run("verify", out, "--files-only", "--json") == cli.DONE
    assert all(finding["passed"] for finding in json.loads(capsys.readouterr().out))
    with (out / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert tiny.run("verify", out) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert "model.onnx" in captured.err and "FAILED" in captured.out


def test_verify_checks_the_schema(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads((out / "report.json").read_text())
    report["accuracy"]["deployed"]["value"] = 1.5
    (out / "report.json").write_text(json.dumps(report))
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["report.json"]["sha256"] = bundle.sha256(out / "report.json")
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert tiny.run("verify", out) == cli.BAD_INPUT
    assert "accuracy.deployed.value" in capsys.readouterr().err


def test_report_is_written_again(hardened: World, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (out / "report.md").write_text("lost")
    assert tiny.run("report", out) == cli.DONE
    assert "bundle:  out" in capsys.readouterr().out
    assert (out / "report.md").read_bytes() == (hardened.bundle / "report.md").read_bytes()
    assert tiny.run("verify", out, "--files-only") == cli.DONE


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_that_is_none(seed: str, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run("benchmark", out, f"--seed={seed}") == cli.BAD_INPUT
    assert "--seed" in capsys.readouterr().err


def test_compare(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(out, "other")
    assert tiny.run("compare", out, "other", "--json") == cli.DONE
    rows = json.loads(capsys.readouterr().out)
    assert [row.pop("bundle") for row in rows] == ["out", "other"] and rows[0] == rows[1]


@pytest.mark.parametrize("command", ["verify", "report", "compare", "benchmark", "attack"])
def test_a_folder_that_is_no_bundle(command: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir()
    assert tiny.run(command, "empty") == cli.BAD_INPUT
    assert "this is no bundle" in capsys.readouterr().err


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    code = tiny.run("doctor", "--json")
    findings = json.loads(capsys.readouterr().out)
    assert code == (cli.BAD_INPUT if any(finding["level"] == "problem" for finding in findings) else cli.DONE)
    assert {"CPU", "data set sample"} <= {finding["topic"] for finding in findings}


# Help

HELP = """
import sys
from toolkit.cli import run
for command in sys.argv[1:]:
    assert run([*command.split(), "--help"]) == 0
heavy = {"torch", "torchvision", "onnx", "onnxruntime", "numpy", "scipy", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    done = python("-W", "error", "-c", HELP, "", *COMMANDS, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert f"Usage: toolkit {command}" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from toolkit import __version__

    assert tiny.run("--version") == cli.DONE
    assert capsys.readouterr().out.strip() == __version__


def test_the_panel_is_readable_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    app.show_error(ToolkitError("a problem [with] brackets", found="/some/place[/bold]", fix="do this"))
    err = capsys.readouterr().err
    assert "a problem [with] brackets" in err and "/some/place[/bold]" in err and os.linesep in err
