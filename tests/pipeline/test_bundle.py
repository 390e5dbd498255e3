from __future__ import annotations

import io
import json
import re
import socket
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from tests import tiny
from tests.tiny import World, report_of
from toolkit import cli, pipeline
from toolkit.evaluators.saturating_layers import saturates_here

FILES = {
    "model.onnx", "model.fp32.onnx", "model.e2e.onnx", "model.pt", "config.yaml", "report.json", "report.md",
    "manifest.json",
}  # fmt: skip


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
