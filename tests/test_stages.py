from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests import tiny
from tests.tiny import World, entries
from toolkit import cli
from toolkit.evaluators import widths
from toolkit.training.run import Run

DATA = ("--data", "npz:data.npz")


def result(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    """What a command prints with --json."""
    code = tiny.run(*arguments, "--json", "-q")
    captured = capsys.readouterr()
    assert code == cli.DONE, captured.err
    assert captured.err == ""
    return json.loads(captured.out)


def train(output: str, *more: str) -> list[str]:
    return ["train", "net.py:net", *DATA, "--epochs", "2", "--threads", "1", "--output", output, *more]


def test_train_writes_a_checkpoint_that_describes_itself(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, *train("deep/new.pt"))
    content = torch.load("deep/new.pt", weights_only=True)
    (record,) = content["spec"]["training"]
    assert record["objective"] == found["objective"] == "standard" and record["epochs"] == 2
    assert content["spec"]["dataset"] == "npz:../data.npz" and len(content["hashes"]) == 540
    assert entries(here / "deep") == ["new.pt"]


def test_training_repeats_and_resumes_to_the_same_weights(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tiny.run(*train("one.pt", "-q")) == cli.DONE
    left = [6]
    advance = Run.advance

    def interrupted(run: Run) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        advance(run)

    monkeypatch.setattr(Run, "advance", interrupted)
    assert tiny.run(*train("two.pt", "-q")) == cli.INTERRUPTED
    assert "--resume" in capsys.readouterr().err
    assert not Path("two.pt").exists() and ".two.pt.partial" in entries(here)
    assert tiny.run(*train("two.pt", "-q", "--resume")) == cli.DONE
    one, two = (torch.load(name, weights_only=True)["state_dict"] for name in ("one.pt", "two.pt"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not [name for name in entries(here) if name.startswith(".")]


def test_a_failed_training_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = entries(here)
    assert tiny.run(*train("new.pt", "--learning-rate", "1e30", "-q")) == cli.BAD_INPUT
    assert "diverged" in capsys.readouterr().err
    assert tiny.run(*train("new.pt", "--resume", "-q")) == cli.BAD_INPUT
    assert "nothing to resume" in capsys.readouterr().err
    assert [name for name in entries(here) if name != "__pycache__"] == before


def test_a_training_that_diverges_late_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    advance = Run.advance

    def poisoned(run: Run) -> None:
        if run.step == 5:
            with torch.no_grad():
                next(run.module.parameters()).fill_(torch.nan)
        advance(run)

    monkeypatch.setattr(Run, "advance", poisoned)
    before = entries(here)
    assert tiny.run(*train("deep/new.pt", "-q")) == cli.BAD_INPUT
    assert tiny.run(*tiny.harden_arguments(), "--finetune", "standard", "-q") == cli.BAD_INPUT
    assert "diverged" in capsys.readouterr().err
    assert [name for name in entries(here) if name != "__pycache__"] == before


@pytest.mark.usefixtures("here")
def test_prune_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """The data set has no preset of a threat model, and none is needed."""
    found = result(capsys, "prune", "model.pt", "--prune", "0.5", "--output", "small.pt")
    assert found["parameters"] == {"before": 6339, "after": 2019}
    assert [(row["before"], row["after"]) for row in found["layers"]] == [(16, 8), (32, 16), (3, 3)]
    assert sum(value.numel() for value in torch.load("small.pt", weights_only=True)["state_dict"].values()) == 2019


@pytest.mark.usefixtures("here")
def test_prune_searches_widths_where_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widths, "MULTIPLES", (1,))
    found = result(capsys, "prune", "model.pt", "--prune", "0.4", "--round-to", "auto", "--output", "small.pt")
    assert [(row["before"], row["after"]) for row in found["layers"]] == [(16, 10), (32, 19), (3, 3)]
    assert torch.load("small.pt", weights_only=True)["spec"]["pruning"][0]["round_to"] == 1


@pytest.mark.usefixtures("here")
def test_export_quantize_and_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, "export", "model.pt", "--output", "float.onnx")
    assert all(batch["agreement"]["value"] == 1 for batch in found["parity"]["batches"])
    said = {entry.key: entry.value for entry in onnx.load("float.onnx").metadata_props}
    assert "threat_model" not in said, "nothing was attacked"
    found = result(capsys, "quantize", "float.onnx", *DATA, "--threads", "1", "--output", "int8.onnx")
    assert found["integer_coverage"] == 1.0 and all("QLinear" in row["kernel"] or row["kernel"] == "QGemm"
                                                    for row in found["layers"])  # fmt: skip
    rows = result(capsys, "benchmark", "float.onnx", "int8.onnx", "--batch", "1", "--rounds", "3", "--threads", "1")
    assert [(row["file"], row["baseline"], row["batch"]) for row in rows] == [
        ("float.onnx", "float.onnx", 1),
        ("int8.onnx", "float.onnx", 1),
    ]
    session = onnxruntime.InferenceSession("int8.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].name == "image"


@pytest.mark.usefixtures("here")
def test_quantize_explains_itself_and_chooses_its_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    result(capsys, "export", "model.pt", "--output", "float.onnx")
    how = ("quantize", "float.onnx", *DATA, "--calibrate", "auto", "--explain", "--threads", "1")
    found = result(capsys, *how, "--output", "int8.onnx")
    assert found["calibration"] in ("minmax", "moving-average", "percentile", "entropy", "mse")
    layers = found["explanation"]["layers"]
    assert {row["layer"] for row in layers} == {row["layer"] for row in found["layers"]}
    assert found["explanation"]["logit_error"] < 0.01 and len(found["explanation"]["tensors"]) >= 2
    assert found["explanation"]["drop"]["robust"] is None, "neither the file nor the archive names a threat model"
    assert tiny.run(*how, "--force", "--output", "int8.onnx", "-q") == cli.DONE
    page = capsys.readouterr().out
    assert f"calibration: {found['calibration']} by onnxruntime, 30 images" in page and "error of the logits" in page
    assert all(row["layer"] in page for row in layers)


@pytest.mark.usefixtures("here")
def test_quantize_judges_under_attack_where_it_knows_one(capsys: pytest.CaptureFixture[str]) -> None:
    """On the network of a checkpoint and on the twin of a file alike."""
    result(capsys, "export", "model.pt", "--output", "float.onnx")
    how = (*DATA, "--explain", "--threads", "1", "--eps", "0.1", "--steps", "3", "--force", "--output", "int8.onnx")
    for given in ("model.pt", "float.onnx"):
        found = result(capsys, "quantize", given, *how)["explanation"]
        assert found["drop"]["robust"] is not None and abs(found["drop"]["robust"]) < 0.2
        drops = [row["sensitivity"]["drop"] for row in found["layers"]]
        assert len(drops) == len(found["layers"]) and all(drop["robust"] is not None for drop in drops)
        assert found["layers"] == sorted(found["layers"], key=lambda row: -row["sensitivity"]["relief"])
        assert tiny.run("quantize", given, *how, "-q") == cli.DONE
        page = capsys.readouterr().out
        assert "of robust accuracy" in page and "margins" in page
    assert tiny.run("quantize", "float.onnx", *how, "--steps", "0") == cli.BAD_INPUT
    assert "--steps" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_quantize_says_what_changes_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    result(capsys, "export", "model.pt", "--output", "float.onnx")
    how = ("quantize", "float.onnx", *DATA, "--reduce-range", "--risks", "--threads", "1", "--output", "int8.onnx")
    found = result(capsys, *how)
    assert found["float_islands"] == [] and set(found["constant_channels"]) <= {row["layer"] for row in found["layers"]}
    rows = {row["setting"]: row for row in found["elsewhere"]["rows"]}
    assert rows["without_vnni"]["overflows"] == 0 and rows["without_vnni"]["changed"]["total"] == tiny.TEST
    assert found["elsewhere"]["attacked"] == 0 and {row["layer"] for row in found["elsewhere"]["layers"]} == {
        row["layer"] for row in found["layers"]
    }
    assert tiny.run(*how, "--force", "-q") == cli.DONE
    page = capsys.readouterr().out
    assert "x86 without VNNI (emulated)" in page and "opset 18 to 23" in page and "0 overflows" in page


@pytest.mark.usefixtures("here")
def test_quantize_warns_of_images_of_another_kind(capsys: pytest.CaptureFixture[str]) -> None:
    """The file knows what it was trained on; the archive that calibrates it is another."""
    result(capsys, "export", "model.pt", "--output", "float.onnx")
    with np.load("data.npz") as archive:
        parts = {name: 255 - archive[name] if name.startswith("x") else archive[name] for name in archive.files}
    np.savez("other.npz", allow_pickle=False, **parts)
    command = ("quantize", "float.onnx", "--threads", "1", "--output", "int8.onnx", "--force", "-q")
    assert tiny.run(*command, "--data", "npz:data.npz") == cli.DONE
    assert "do not look like" not in capsys.readouterr().err
    assert tiny.run(*command, "--data", "npz:other.npz") == cli.DONE
    said = capsys.readouterr().err
    assert "do not look like the training images" in said and "mean 0.7" in said and "--data" in said


@pytest.mark.usefixtures("here")
def test_operators_without_integer_kernels_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    result(capsys, "export", "model.pt", "--output", "float.onnx")
    command = ("quantize", "float.onnx", *DATA, "--keep-float", "node_conv2d", "--threads", "1", "--output", "q.onnx")
    found = result(capsys, *command)
    assert {row["operator"] for row in found["float_islands"]} & {"Conv", "FusedConv"}
    assert tiny.run(*command, "--force", "-q") == cli.DONE
    page = capsys.readouterr().out
    assert "no integer kernel: 1 " in page and "% of kernel time" in page


DISTILL = ("train", "net.py:net", "--objective", "distill", "--eps", "0.1", *DATA, "--output", "new.pt")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", "nothing.onnx", *DATA], ["nothing.onnx"]),
        (["quantize", "net.py", *DATA], ["ONNX", "net.py"]),
        (["benchmark", "net.py"], ["net.py"]),
        (["export", "model.pt", "--output", "net.py"], ["exists", "--force"]),
        (["prune", "model.pt", "--output", "folder"], ["folder"]),
        (["prune", "model.pt", "--output", "net.py/x.pt"], ["cannot be written"]),
        (["train", "cnn9", *DATA, "--output", "new.pt"], ["cnn9", "did you mean 'cnn8'"]),
        (["train", "net.py:nothing", *DATA, "--output", "new.pt"], ["nothing"]),
        (["train", "net.py:net", "--objective", "adversarial", *DATA, "--output", "new.pt"], ["--eps"]),
        (["train", "net.py:net", *DATA, "--output", "net.py/x.pt"], ["cannot be written"]),
        (["train", "net.py:net", "--objective", "trade", *DATA, "--output", "new.pt"], ["--objective", "'trades'"]),
        (["train", "net.py:net", "--objective", "fgsm", *DATA, "--output", "new.pt"], ["--eps"]),
        (["train", "net.py:net", "--beta", "-1", *DATA, "--output", "new.pt"], ["--beta"]),
        (["train", "net.py:net", "--ema", "1", *DATA, "--output", "new.pt"], ["--ema"]),
        (["train", "net.py:net", "--temperature", "0", *DATA, "--output", "new.pt"], ["--temperature"]),
        (["train", "net.py:net", "--clean-share", "2", *DATA, "--output", "new.pt"], ["--clean-share"]),
        ([*DISTILL], ["distillation needs a teacher", "--teacher FILE"]),
        ([*DISTILL, "--teacher", "nothing.pt"], ["not there", "nothing.pt", "that --teacher names"]),
    ],
)
def test_bad_input_leaves_nothing(
    arguments: list[str], words: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "folder").mkdir()
    before = entries(here)
    assert tiny.run(*arguments, "-q") == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == "" and "fix:" in captured.err
    said = "".join(line.strip("│ ").replace(" ", "") for line in captured.err.splitlines())
    assert all(word.replace(" ", "") in said for word in words), captured.err
    assert [name for name in entries(here) if name != "__pycache__"] == before


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_what_is_read_is_never_replaced(
    force: tuple[str, ...], out: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(out / "model.fp32.onnx", here / "model.onnx")  # where quantize writes unless told otherwise
    before = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    for command in (
        ("quantize", "model.onnx", *DATA),
        ("export", "model.pt", *DATA, "--output", "model.pt"),
        ("prune", "model.pt", *DATA, "--output", "model.pt"),
        ("prune", "model.pt", *DATA, "--output", "data.npz"),
    ):
        assert tiny.run(*command, *force, "-q") == cli.BAD_INPUT
        assert "would remove what is to be read" in " ".join(capsys.readouterr().err.split())
    assert all((here / name).read_bytes() == content for name, content in before.items())


@pytest.mark.usefixtures("here")
def test_quantize_takes_a_bare_state_dict_and_no_such_flags_with_an_onnx_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(torch.load("model.pt", weights_only=True)["state_dict"], "weights.pt")
    own = result(capsys, "quantize", "model.pt", "--threads", "1", "--output", "own.onnx")
    command = ("quantize", "weights.pt", "--arch", "net.py:net", *DATA, "--threads", "1", "--output", "int8.onnx")
    bare = result(capsys, *command)
    assert bare["accuracy"]["deployed"]["total"] == own["accuracy"]["deployed"]["total"]
    assert bare["integer_coverage"] == own["integer_coverage"] == 1
    assert tiny.run("export", "model.pt", "--output", "float.onnx", "-q") == cli.DONE
    normalised = ("quantize", "float.onnx", *DATA, "--mean", "0.5", "--output", "other.onnx", "-q")
    assert tiny.run(*normalised) == cli.BAD_INPUT
    assert "an ONNX file is quantised as it is" in capsys.readouterr().err and not Path("other.onnx").exists()


def test_quantize_refuses_images_of_another_shape(out: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = entries(here)
    command = ("quantize", out / "model.fp32.onnx", "--data", "sample", "--output", "int8.onnx", "-q")
    assert tiny.run(*command) == cli.BAD_INPUT
    assert "28" in capsys.readouterr().err and entries(here) == before


def test_attack_on_a_bundle_finds_the_reports_figures(
    hardened: World, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((hardened.bundle / "report.json").read_text())
    found = result(capsys, "attack", out, "--attacks", "fast", "--threads", "1")
    assert found["threat"] == report["threat"] and found["images"] == 150
    assert found["accuracy"]["deployed"] == report["accuracy"]["deployed"]
    # The network that came in is not in the bundle, so one surrogate fewer attacks.
    for graph in ("deployed", "fp32"):
        assert found["robust_accuracy"][graph]["correct"] - report["robust_accuracy"][graph]["correct"] in (0, 1, 2)


@pytest.mark.usefixtures("here")
def test_attack_on_a_bundle_uses_its_images_and_seed(capsys: pytest.CaptureFixture[str]) -> None:
    command = [*tiny.harden_arguments(epochs=0), "--n", "40", "--seed", "7", "--threads", "1", "-q"]
    assert tiny.run(*command) == cli.DONE
    capsys.readouterr()
    report = json.loads(Path("out/report.json").read_text())
    found = result(capsys, "attack", "out", "--attacks", "pgd", "--threads", "1")
    assert found["images"] == 40 and found["accuracy"]["deployed"] == report["accuracy"]["deployed"]
    own = [row for row in report["robustness"] if row["surrogate"] != "original"]  # it is not in the bundle
    matrices = [
        {(row["surrogate"], row["target"]): row["correct"] for row in rows} for rows in (own, found["robustness"])
    ]
    assert matrices[0] == matrices[1]
    more = result(capsys, "attack", "out", "--attacks", "pgd", "--n", "60", "--steps", "2", "--threads", "1")
    assert more["images"] == 60 and more["steps"] == 2 and more["threat"] == report["threat"]


def test_attack_finds_the_code_of_a_bundles_network_elsewhere(
    out: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "code").mkdir()
    for name in ("net.py", "layers.py"):
        (here / name).rename(here / "code" / name)
    assert tiny.run("attack", out, "-q") == cli.BAD_INPUT
    assert "net.py" in capsys.readouterr().err
    found = result(
        capsys, "attack", out, "--arch", "code/net.py:net", "--n", "20", "--attacks", "pgd", "--threads", "1"
    )
    assert found["images"] == 20


def test_attack_on_a_pair_that_does_not_belong_together(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_archive(Path("four.npz"), classes=4, train=100, test=20)
    other = ["train", "net.py:net", "--data", "npz:four.npz", "--epochs", "0", "--output", "four.pt", "-q"]
    assert tiny.run(*other) == cli.DONE
    capsys.readouterr()
    assert tiny.run("attack", "four.pt", "--target", out / "model.onnx", "--eps", "0.1", "-q") == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "no form of the model" in said and "3 classes" in said


def test_benchmark_of_bundles(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = result(capsys, "benchmark", out, "--batch", "1,2", "--rounds", "3", "--threads", "1")
    assert [(row["file"], row["batch"]) for row in rows] == [("fp32", 1), ("deployed", 1), ("fp32", 2), ("deployed", 2)]
    assert all(row["baseline"] == "fp32" and row["threads"] == 1 for row in rows)


def test_a_student_is_distilled_from_a_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tiny.run(*DISTILL, "--teacher", "model.pt", "--epochs", "2", "--threads", "1", "-q") == cli.DONE
    content = torch.load("new.pt", weights_only=True)
    (record,) = content["spec"]["training"]
    assert record["objective"] == "distill" and len(record["teacher_sha256"]) == 64
    assert str(here) not in str(content["spec"])
    capsys.readouterr()
    assert tiny.run(*DISTILL[:2], *DATA, "-o", "two.pt", "--teacher", "model.pt", "--epochs", "0", "-q") == cli.DONE
    assert "the objective standard makes no use of --teacher" in capsys.readouterr().err


def test_a_teacher_that_saw_the_images_that_judge_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load("data.npz") as archive:  # trained on what is tested here
        other = {"x_train": archive["x_test"], "y_train": archive["y_test"]}
        other |= {"x_test": archive["x_train"], "y_test": archive["y_train"]}
    np.savez_compressed("other.npz", allow_pickle=False, **other)
    teach = ["train", "net.py:net", "--data", "npz:other.npz", "--epochs", "1", "--batch-size", "32"]
    teach += ["--output", "teacher.pt"]
    assert tiny.run(*teach, "--threads", "1", "-q") == cli.DONE
    assert tiny.run(*DISTILL, "--teacher", "teacher.pt", "-q") == cli.BAD_INPUT
    said = capsys.readouterr().err
    assert "the teacher was trained on images that are to judge it" in said and "evaluation images" in said
    assert not (here / "new.pt").exists()
