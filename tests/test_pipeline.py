from __future__ import annotations

import io
import json
import re
import shutil
import socket
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from torch import nn

from tests import tiny
from tests.tiny import World, repeatable
from toolkit import cli, graphs, pipeline, planning, prepare
from toolkit.config import HardenConfig, QuantizeConfig, build, read_settings
from toolkit.evaluators import widths, worst_case
from toolkit.evaluators.assignment import Assignment, Drop, find_assignment
from toolkit.evaluators.saturating_layers import saturates_here
from toolkit.evaluators.timing import Interval
from toolkit.evaluators.widths import RoundingChoice, choose_rounding
from toolkit.training.run import Run

FILES = {
    "model.onnx", "model.fp32.onnx", "model.e2e.onnx", "model.pt", "config.yaml", "report.json", "report.md",
    "manifest.json",
}  # fmt: skip


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def test_a_bundle_holds_every_file_and_nothing_else_is_left(hardened: World) -> None:
    assert set(tiny.entries(hardened.bundle)) == FILES
    left = set(tiny.entries(hardened.folder)) - {"__pycache__"}
    assert left == {"data.npz", "layers.py", "model.pt", "net.py", "out"}


def test_it_says_what_changes_elsewhere(hardened: World) -> None:
    quantization = report_of(hardened.bundle)["quantization"]
    found = quantization["elsewhere"]
    assert found["images"] == found["attacked"] == tiny.TEST
    wanted = {
        "unoptimised", "without_vnni", "opset", "reduce_range", "reduce_range_without_vnni", "s8s8", "float_bias"
    }  # fmt: skip
    here = {"with_vnni"} if saturates_here() else set()
    assert {row["setting"] for row in found["rows"]} == wanted | here
    assert all(row["changed"]["total"] == row["changed_attacked"]["total"] == tiny.TEST for row in found["rows"])
    assert {row["layer"] for row in found["layers"]} == {row["layer"] for row in quantization["layers"]}
    assert "## Elsewhere" in (hardened.bundle / "report.md").read_text()
    said = {entry.key: entry.value for entry in onnx.load(hardened.bundle / "model.fp32.onnx").metadata_props}
    statistics = json.loads(said["pixel_statistics"])
    assert statistics["images"] == 500 and 0.2 < statistics["mean"][0] < 0.3


def test_the_input_is_as_it_was(hardened: World) -> None:
    with tiny.working_folder(hardened.folder):
        assert torch.load("model.pt", weights_only=True)["spec"]["pruning"] == ()


def test_the_graphs_keep_their_contract(hardened: World) -> None:
    for name in ("model.onnx", "model.fp32.onnx"):
        session = onnxruntime.InferenceSession(hardened.bundle / name, providers=["CPUExecutionProvider"])
        (image,), (logits,) = session.get_inputs(), session.get_outputs()
        assert (image.name, image.type, image.shape[1:]) == ("image", "tensor(float)", [1, 16, 16])
        assert (logits.name, logits.type, logits.shape[1:]) == ("logits", "tensor(float)", [tiny.CLASSES])
        for size in (1, 5):
            found = session.run(None, {"image": np.zeros((size, 1, 16, 16), np.float32)})[0]
            assert found.shape == (size, tiny.CLASSES)


def test_the_onnx_files_say_what_they_are(hardened: World) -> None:
    report = report_of(hardened.bundle)
    for name in ("model.onnx", "model.e2e.onnx"):
        said = {entry.key: entry.value for entry in onnx.load(hardened.bundle / name).metadata_props}
        assert json.loads(said["class_names"]) == ["0", "1", "2"]
        assert json.loads(said["normalization"])["mean"] == [0.5]
        assert json.loads(said["threat_model"])["eps"] == pytest.approx(0.12)
        assert said["toolkit_version"]
        results = json.loads(said["results"])
        assert results["accuracy"] == report["accuracy"]["deployed"]
        assert results["robust_accuracy"] == report["robust_accuracy"]["deployed"]


def test_no_shipped_file_tells_of_the_machine_that_made_it(hardened: World) -> None:
    """The folder was made with relative names; what is left must be ours."""
    forbidden = [str(hardened.folder), str(Path(pipeline.__file__).parent), str(Path.home()), "site-packages"]
    forbidden += ["Traceback", 'File "', "stack_trace", "pkg.torch", "def forward"]
    if len(socket.gethostname()) > 3:
        forbidden.append(socket.gethostname())
    for path in hardened.bundle.iterdir():
        content = path.read_bytes()
        for text in forbidden:
            assert text.encode() not in content, f"{path.name}: {text}"
        if path.suffix in (".yaml", ".json", ".md"):
            assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|var|work|opt|Users)/", content.decode()), path.name


def test_shipped_files_hold_no_path_where_the_user_gave_absolute_ones(here: Path) -> None:
    command = tiny.harden_arguments(here / "out", model=str(here / "model.pt"), epochs=0)
    assert tiny.run(*command, "--data", f"npz:{here / 'data.npz'}", "--threads", "1", "-q") == cli.DONE
    for path in (here / "out").iterdir():
        assert str(here).encode() not in path.read_bytes(), path.name


# The independent check: finds the report's figures from the bundle and the images, without a line of the toolkit.


Pictures = tuple[torch.Tensor, torch.Tensor]


class Affine(nn.Module):
    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return (image - self.mean) / self.std


@pytest.fixture(scope="module")
def pictures(hardened: World) -> Pictures:
    archive = np.load(hardened.folder / "data.npz")
    pixels = torch.from_numpy(archive["x_test"]).float() / 255
    return pixels, torch.from_numpy(archive["y_test"]).long()


@pytest.fixture(scope="module")
def network(hardened: World) -> nn.Module:
    """The pruned network, rebuilt from the shapes of its weights."""
    content = torch.load(hardened.bundle / "model.pt", weights_only=True)
    state, spec = content["state_dict"], content["spec"]
    layers = OrderedDict[str, nn.Module]()
    for index in (0, 2):
        filters, channels = state[f"{index}.weight"].shape[:2]
        layers[str(index)] = nn.Conv2d(channels, filters, 3, stride=2, padding=1)
        layers[str(index + 1)] = nn.ReLU()
    layers["4"] = nn.Flatten()
    layers["5"] = nn.Linear(*reversed(state["5.weight"].shape))
    plain = nn.Sequential(layers)
    plain.load_state_dict(state)
    mean, std = spec["normalization"]["mean"][0], spec["normalization"]["std"][0]
    return nn.Sequential(Affine(mean, std), plain).eval()


def logits_of(folder: Path, name: str, pixels: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"image": pixels.numpy()})[0])


def test_clean_accuracy_exactly(hardened: World, pictures: Pictures, network: nn.Module) -> None:
    pixels, labels = pictures
    report = report_of(hardened.bundle)["accuracy"]
    with torch.no_grad():
        found = {"torch": network(pixels)}
    found["fp32"] = logits_of(hardened.bundle, "model.fp32.onnx", pixels)
    found["deployed"] = logits_of(hardened.bundle, "model.onnx", pixels)
    for name, logits in found.items():
        right = int((logits.argmax(1) == labels).sum())
        assert (report[name]["correct"], report[name]["total"]) == (right, len(labels))


def test_robust_accuracy_by_another_pgd(hardened: World, pictures: Pictures, network: nn.Module) -> None:
    pixels, labels = pictures
    report = report_of(hardened.bundle)
    cell = next(row for row in report["robustness"] if (row["surrogate"], row["target"]) == ("float", "deployed"))
    eps, step = cell["threat"]["eps"], cell["step_size"]
    assert cell["threat"]["space"] == "pixels" and not cell["random_start"]
    attacked = pixels.clone()
    for _ in range(cell["steps"]):
        attacked.requires_grad_(True)
        loss = nn.functional.cross_entropy(network(attacked), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, attacked)
        moved = attacked.detach() + step * gradient.sign()
        attacked = torch.minimum(torch.maximum(moved, pixels - eps), pixels + eps).clamp(0, 1)
    clean = logits_of(hardened.bundle, "model.onnx", pixels).argmax(1) == labels
    robust = logits_of(hardened.bundle, "model.onnx", attacked).argmax(1) == labels
    share = float(robust.float().mean())
    assert 0.05 < share < 0.95, "an attack that decides everything or nothing tests nothing"
    assert share == pytest.approx(cell["value"], abs=0.02)
    assert report["robust_accuracy"]["deployed"]["value"] <= float((clean & robust).float().mean())


def test_the_evidence_of_a_bundle_is_whole(hardened: World) -> None:
    report = report_of(hardened.bundle)
    surrogates, targets = {"original", "float", "fake_quantised", "twin"}, {"torch", "fp32", "deployed"}
    cells = [(row["surrogate"], row["target"]) for row in report["robustness"]]
    assert set(cells) == {(one, other) for one in surrogates for other in (*targets, "deployed_unoptimised")}
    assert len(cells) == len(set(cells)) and len(report["columns"]) == len(surrogates) * 3
    worst, clean = report["robust_accuracy"]["deployed"], report["accuracy"]["deployed"]
    assert all(worst["correct"] <= row["correct"] for row in report["robustness"] if row["target"] == "deployed")
    assert worst["correct"] <= clean["correct"] and report["worst_case"]["attacks"] == "fast"
    assert worst["correct"] <= report["robust_accuracy"]["deployed_from_file"]["correct"]
    assert report["worst_case"]["complete"] and {row["attack"] for row in report["worst_case"]["passes"]} > {"apgd-ce"}
    assert report["fidelity"]["valid"] and len(report["saturation"]) >= 3
    assert report["security_curve"][0]["correct"] == clean["correct"] and report["security_curve"][-1]["value"] < 0.4


def test_integer_kernels_in_the_optimised_graph(hardened: World, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3  # it warns that the file fits this machine alone
    onnxruntime.InferenceSession(hardened.bundle / "model.onnx", options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    operators = [node.op_type for node in graph.node]
    assert sorted(name for name in operators if name in ("QLinearConv", "QGemm")) == [
        "QGemm", "QLinearConv", "QLinearConv",
    ]  # fmt: skip
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"} & set(operators)
    state = torch.load(hardened.bundle / "model.pt", weights_only=True)["state_dict"]
    positions = {"0.weight": 8 * 8, "2.weight": 4 * 4, "5.weight": 1}
    macs = sum(state[name].numel() * count for name, count in positions.items())
    found = report_of(hardened.bundle)["quantization"]
    assert (found["macs_integer"], found["macs_total"], found["integer_coverage"]) == (macs, macs, 1.0)
    assert report_of(hardened.bundle)["model"]["macs"]["after"] == macs


def test_parameters_and_bytes(hardened: World) -> None:
    report = report_of(hardened.bundle)["model"]
    for name, folder in (("before", hardened.folder), ("after", hardened.bundle)):
        state = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
        assert report["params"][name] == sum(value.numel() for value in state.values())
    assert report["params"]["after"] < report["params"]["before"]
    assert report["bytes"]["after"] == (hardened.bundle / "model.onnx").stat().st_size < report["bytes"]["before"]


def test_end_to_end_on_a_file(hardened: World, pictures: Pictures) -> None:
    from onnxruntime_extensions import get_library_path
    from PIL import Image

    pixels = pictures[0][:1]
    buffer = io.BytesIO()
    Image.fromarray((pixels[0, 0] * 255).round().byte().numpy()).save(buffer, "PNG")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(get_library_path())
    session = onnxruntime.InferenceSession(
        hardened.bundle / "model.e2e.onnx", options, providers=["CPUExecutionProvider"]
    )
    encoded = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    found = session.run(None, {session.get_inputs()[0].name: encoded})[0]
    expected = logits_of(hardened.bundle, "model.onnx", pixels).softmax(1).numpy()
    assert found.reshape(1, -1) == pytest.approx(expected, abs=1e-5)


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


class Interrupt:
    """Raises KeyboardInterrupt at the given optimiser step, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        self.left = step
        original = Run.advance

        def advance(run: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            original(run)

        monkeypatch.setattr(Run, "advance", advance)


def test_a_resumed_run_equals_an_uninterrupted_one(
    hardened: World, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*tiny.harden_arguments("again", attacks="fast"), "--threads", "1", "-q"]
    Interrupt(monkeypatch, step=6)
    assert tiny.run(*command) == cli.INTERRUPTED
    assert f"continue with: toolkit {' '.join(command)} --resume" in capsys.readouterr().err
    assert not Path("again").exists()
    assert tiny.entries(here / ".again.partial") == ["training.pt"]
    assert tiny.run(*command, "--resume") == cli.DONE
    assert repeatable(report_of(Path("again"))) == repeatable(report_of(hardened.bundle))
    assert (here / "again/model.onnx").read_bytes() == (hardened.bundle / "model.onnx").read_bytes()
    assert ".again.partial" not in tiny.entries(here)


def test_an_evaluation_that_was_interrupted_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*tiny.harden_arguments("again", epochs=0, attacks="apgd-ce,square"), "--threads", "1", "-q"]
    real, made = worst_case._attack, []

    def interrupted(attempt: Any, *rest: Any) -> Any:
        if attempt.how.by_queries:
            raise KeyboardInterrupt
        made.append(str(attempt))
        return real(attempt, *rest)

    def only_what_is_left(attempt: Any, *rest: Any) -> Any:
        assert str(attempt) not in made, "made twice"
        return real(attempt, *rest)

    monkeypatch.setattr(worst_case, "_attack", interrupted)
    assert tiny.run(*command) == cli.INTERRUPTED
    assert f"continue with: toolkit {' '.join(command)} --resume" in capsys.readouterr().err
    assert tiny.entries(here / ".again.partial") == ["journals"] and made
    assert tiny.run(*command) == cli.BAD_INPUT, "a mistyped command must not cost an evaluation"
    monkeypatch.setattr(worst_case, "_attack", only_what_is_left)
    assert tiny.run(*command, "--resume") == cli.DONE
    passes = report_of(Path("again"))["worst_case"]["passes"]
    kinds = [row["attack"] for row in passes]
    assert set(kinds) == {"apgd-ce", "square"} and kinds == sorted(kinds)
    assert [row["graphs"] for row in passes if row["attack"] == "square"] == [["deployed"], ["fp32"]]
    assert ".again.partial" not in tiny.entries(here)


def test_a_resume_with_other_threads_or_settings(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = tiny.harden_arguments("again")
    Interrupt(monkeypatch, step=6)
    assert tiny.run(*command, "--threads", "1") == cli.INTERRUPTED
    assert tiny.run(*command, "--threads", "1", "--seed", "5", "--resume") == cli.BAD_INPUT
    assert "had other settings" in capsys.readouterr().err
    assert tiny.entries(here / ".again.partial") == ["training.pt"], "the interrupted run is still there"
    assert tiny.run(*command, "--threads", "2", "--resume") == cli.DONE
    err = capsys.readouterr().err
    assert "began with 1 thread(s) and goes on with 2" in err and "--threads 1 avoids that" in err


def test_an_interrupt_before_anything_can_be_resumed_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny.entries(here)
    Interrupt(monkeypatch, step=1)
    assert tiny.run(*tiny.harden_arguments("deep/again"), "-q") == cli.INTERRUPTED
    assert "start again with the same command" in capsys.readouterr().err
    assert [name for name in tiny.entries(here) if name != "__pycache__"] == before


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


def test_a_search_for_the_integer_layers_is_told_and_not_repeated(here: Path) -> None:
    command = [*tiny.harden_arguments(epochs=0, precision="auto"), "--calibrate", "auto"]
    assert tiny.run(*command, "--threads", "1", "-q") == cli.DONE
    first = report_of(here / "out")["quantization"]
    found = first["assignment"]
    settings = yaml.safe_load(Path("out/config.yaml").read_text())["quantize"]
    assert settings["precision"] == "int8" and settings["keep_float"] == found["keep_float"]
    assert settings["calibrate"] == first["calibration"] != "auto"
    assert len(first["calibration_methods"]) == 5 and "## Calibration methods" in Path("out/report.md").read_text()
    integer = {row["layer"] for row in first["layers"] if row["integer"]}
    assert integer and not integer & set(found["keep_float"]), "what was chosen is what ships"
    assert found["images"] == 30 and found["tried"] >= 1
    assert "## Which layers are integer" in Path("out/report.md").read_text()
    assert tiny.run("harden", "--config", "out/config.yaml", "--output", "again", "-q") == cli.DONE
    assert report_of(here / "again")["quantization"]["assignment"] is None
    assert Path("again/model.onnx").read_bytes() == Path("out/model.onnx").read_bytes()


def test_where_integers_do_not_pay_the_float_graph_ships_if_that_is_allowed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Interval(1.2, 1.1, 1.3)
    searched = []

    def find(*_: object, **__: object) -> Assignment:
        searched.append(1)
        return Assignment((), slow, slow, Drop(0, 0), Drop(0, 0), 60, 1)

    monkeypatch.setattr(graphs, "find_assignment", find)
    command = tiny.harden_arguments(epochs=0, precision="auto")
    assert tiny.run(*command, "--allow-float", "--threads", "1", "-q") == cli.DONE
    found = report_of(here / "out")["quantization"]
    assert found["engine"] == "none" and "int8 does not pay on this machine" in found["verdict"]
    assert found["assignment"]["pays"] is False and found["assignment"]["shipped"]["ratio"] == 1.2
    assert yaml.safe_load(Path("out/config.yaml").read_text())["quantize"]["int8"] is False
    assert tiny.run("verify", "out", "-q") == cli.DONE
    assert tiny.run(*command, "--force", "--threads", "1", "-q") == cli.DONE
    assert report_of(here / "out")["quantization"]["engine"] == "onnxruntime" and len(searched) == 2


def test_a_resumed_run_searches_no_second_time(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[int] = []

    def find(*arguments: Any, **how: Any) -> Assignment:
        searched.append(1)
        return find_assignment(*arguments, **how)

    monkeypatch.setattr(graphs, "find_assignment", find)
    command = [*tiny.harden_arguments(epochs=1, precision="auto"), "--threads", "1", "-q"]
    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "build_report", lambda *_: 1 / 0)
        assert tiny.run(*command) != cli.DONE
    assert (here / ".out.partial" / "assignment.json").exists()
    assert tiny.run(*command, "--resume") == cli.DONE
    assert len(searched) == 1 and report_of(here / "out")["quantization"]["assignment"]["tried"] >= 1


def test_a_quantisation_aware_run_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*tiny.harden_arguments(precision="auto"), "--qat", "--keep-float", "node_linear", "--threads", "1"]
    assert tiny.run(*command, "--dry-run") == cli.DONE
    assert "2 epoch(s) of 540 images, quantisation-aware" in capsys.readouterr().out
    assert tiny.run(*command, "-q") == cli.DONE
    report = report_of(here / "out")
    assert report["finetuning"]["qat"] and report["finetuning"]["best_epoch"] == 2
    assert report["quantization"]["learnt_ranges"] >= 2 and report["quantization"]["integer_coverage"] > 0.5
    page = Path("out/report.md").read_text()
    assert "Quantisation-aware: its last 50%" in page and "whose ranges fine-tuning learnt" in page
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


def test_a_search_for_the_widths_is_told_and_not_repeated(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widths, "MULTIPLES", (1, 8))
    searched: list[int] = []

    def choose(*arguments: Any, **how: Any) -> RoundingChoice:
        searched.append(1)
        return choose_rounding(*arguments, **how)

    monkeypatch.setattr(graphs, "choose_rounding", choose)
    command = [*tiny.harden_arguments(epochs=1), "--prune", "0.4", "--round-to", "auto", "--threads", "1", "-q"]
    with monkeypatch.context() as broken:
        broken.setattr(pipeline, "build_report", lambda *_: 1 / 0)
        assert tiny.run(*command) != cli.DONE
    assert tiny.run(*command, "--resume") == cli.DONE and len(searched) == 1
    model = report_of(here / "out")["model"]
    (taken,) = [row for row in model["roundings"] if row["chosen"]]
    assert [row["round_to"] for row in model["roundings"]] == [1, 8]
    assert yaml.safe_load(Path("out/config.yaml").read_text())["prune"]["round_to"] == taken["round_to"]
    assert model["round_to"] == taken["round_to"] and model["macs"]["after"] == taken["macs"]
    assert "## Widths" in Path("out/report.md").read_text()
    assert tiny.run("harden", "--config", "out/config.yaml", "--output", "again", "-q") == cli.DONE
    assert report_of(here / "again")["model"]["roundings"] == [] and len(searched) == 1
    assert Path("again/model.onnx").read_bytes() == Path("out/model.onnx").read_bytes()


@pytest.mark.usefixtures("here")
def test_widths_are_not_searched_by_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = [*tiny.harden_arguments(epochs=0), "--round-to", "auto", "-q"]
    assert tiny.run(*command) == cli.BAD_INPUT
    assert "name the multiple" in capsys.readouterr().err


def test_where_nothing_is_pruned_no_widths_are_searched(here: Path) -> None:
    command = [*tiny.harden_arguments(epochs=0), "--prune", "0", "--round-to", "auto", "--threads", "1", "-q"]
    assert tiny.run(*command) == cli.DONE
    assert yaml.safe_load(Path("out/config.yaml").read_text())["prune"]["round_to"] == 8
    assert report_of(here / "out")["model"]["roundings"] == []


def test_a_dry_run_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tiny.entries(here)
    assert tiny.run(*tiny.harden_arguments(), "--dry-run") == cli.DONE
    assert [name for name in tiny.entries(here) if name != "__pycache__"] == before
    plan = capsys.readouterr().out
    assert "6,339 -> 2,019 parameters" in plan and "2 epoch(s) of 540 images" in plan
    assert re.search(r"in all about \d+\.\d minutes", plan) and plan.count(" s\n") >= 6


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("objective", "passes"), [("fgsm", 2.6), ("trades", 10.2), ("standard", 1.6), ("none", 0)])
def test_a_dry_run_counts_the_passes_of_the_objective(
    objective: str, passes: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "seconds_per_image", lambda *_: 1.0)
    more = ["--finetune", objective, "--dry-run", "--json", "-q"]
    assert tiny.run(*tiny.harden_arguments(), *more) == cli.DONE
    plan = {row["step"].split()[0]: row["seconds"] for row in json.loads(capsys.readouterr().out)}
    assert plan["fine-tune"] == pytest.approx(2 * 540 * passes)


@pytest.mark.usefixtures("here")
def test_a_dry_run_counts_surrogates_and_attacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "seconds_per_image", lambda *_: 1.0)
    found = {}
    for attacks in ("pgd", "fast", "ensemble", "square"):
        assert tiny.run(*tiny.harden_arguments(attacks=attacks), "--dry-run", "--json", "-q") == cli.DONE
        (row,) = [row for row in json.loads(capsys.readouterr().out) if row["step"].startswith("evaluate")]
        assert f"PGD-5 on all surrogates, {attacks}; 150 images" in row["step"]
        found[attacks] = row["seconds"]
    assert found["pgd"] < found["fast"] < found["ensemble"]
    searched = 2  # the float twin and the deployed graph
    assert found["square"] - found["pgd"] == pytest.approx(150 * 5000 * planning.QUERY_COST * searched)


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


def test_a_provider_that_is_not_there_is_refused_before_training(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the provider")
    monkeypatch.setattr(Run, "advance", lambda _run: pytest.fail("it was trained"))
    assert tiny.run(*tiny.harden_arguments(), "--provider", "cuda", "-q") == cli.BAD_INPUT
    assert "cuda" in capsys.readouterr().err.lower()
    assert not any("out" in name for name in tiny.entries(here))


def test_a_diverged_training_leaves_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*tiny.harden_arguments(), "--learning-rate", "1e30", "-q"]
    assert tiny.run(*command) == cli.BAD_INPUT
    assert "diverged" in capsys.readouterr().err
    assert not any("out" in name for name in tiny.entries(here))


@pytest.mark.parametrize(
    ("saturates", "how", "provider", "wanted"),
    [
        (True, {}, "cpu", True),
        (False, {}, "cpu", False),
        (True, {"reduce_range": False}, "cpu", False),
        (False, {"reduce_range": True}, "cpu", True),
        (True, {"activation_bits": 16}, "cpu", False),
        (True, {}, "cuda", False),
    ],
)
def test_weights_have_seven_bits_where_sums_saturate_unless_told_otherwise(
    saturates: bool, how: dict[str, Any], provider: Any, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "saturates_here", lambda: saturates)
    assert prepare.resolved_quantize(QuantizeConfig(**how), provider).reduce_range is wanted
