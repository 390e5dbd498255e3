from __future__ import annotations

import argparse
import copy
import json
import pathlib
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.toys import GREY, names, wrap
from toolkit.artifacts import ModelSpec, TorchModel
from toolkit.errors import ToolkitError
from toolkit.models.checkpoint import FORMAT, save_checkpoint, spec_from_dict, spec_to_dict
from toolkit.models.loading import HARMLESS, assemble, read_model_file
from toolkit.models.networks import cnn8

SHAPE = (1, 12, 12)
IMAGES = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0))


class Home(nn.Module):
    """A network that only its own file could build; pickled by reference to this module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = cnn8(10, SHAPE)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(image)
        return logits


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(1)
    return cnn8(10, SHAPE)


def load(path: Path, *, arch: str | None = None, trust_pickle: bool = False, classes: int = 10) -> TorchModel:
    return assemble(
        read_model_file(path, trust_pickle=trust_pickle),
        arch=arch,
        class_names=names(classes),
        input_shape=SHAPE,
        normalization=GREY,
        dataset="toy",
    )


def logits(network: nn.Module) -> torch.Tensor:
    return wrap(copy.deepcopy(network)).predict(IMAGES)


def refusal(path: Path, **options: Any) -> ToolkitError:
    with pytest.raises(ToolkitError) as caught:
        load(path, **options)
    assert caught.value.found and caught.value.fix
    return caught.value


def test_our_checkpoint_needs_no_flag_and_comes_back_equal(network: nn.Module, tmp_path: Path) -> None:
    spec = ModelSpec("cnn8", names(10), SHAPE, GREY, "fashion-mnist", training=({"epochs": 3},))
    model = TorchModel(wrap(network).module, spec, np.array([1, 2**64 - 1], dtype=np.uint64))
    save_checkpoint(model, tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt", classes=3)
    assert loaded.spec == spec
    assert loaded.training_hashes.tolist() == [1, 2**64 - 1]
    assert torch.equal(loaded.predict(IMAGES), model.predict(IMAGES))


def test_a_spec_is_plain_json_data() -> None:
    spec = ModelSpec("cnn8", names(3), SHAPE, GREY, None, ({"history": [["0", True, [1]]]},), ({"seed": 1},))
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


def test_our_checkpoint_of_another_version_or_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"format": "onnx-hardening-toolkit/9"}, path)
    assert refusal(path).problem == "the checkpoint is of another version"
    torch.save({"format": FORMAT, "state_dict": {}}, path)
    assert refusal(path).problem == "the checkpoint is damaged"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "net.", "network.", "module._orig_mod."])
def test_prefixes_are_understood(network: nn.Module, tmp_path: Path, prefix: str) -> None:
    torch.save({prefix + key: value for key, value in network.state_dict().items()}, tmp_path / "a.pth")
    assert torch.equal(load(tmp_path / "a.pth", arch="cnn8").predict(IMAGES), logits(network))


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model", "net", "ema", "module", "params"])
def test_the_usual_wrappers_with_what_training_scripts_save_beside(
    network: nn.Module, tmp_path: Path, wrapper: str
) -> None:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    beside = {
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, data=pathlib.Path("data"), betas=(0.9, 0.99)),
        "best": np.float64(0.9),
        "rank": np.int64(2),
        "history": np.arange(3.0),
        "optimizer": optimizer.state_dict(),
        "meta": OrderedDict(a=1),
        "loss": torch.tensor(0.5),
    }
    torch.save({**beside, wrapper: OrderedDict(network.state_dict())}, tmp_path / "a.pt")
    assert torch.equal(load(tmp_path / "a.pt", arch="cnn8").predict(IMAGES), logits(network))


def test_wrappers_within_wrappers_and_numbers_among_the_weights(network: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": {"model": network.state_dict()}}, tmp_path / "nested.pt")
    torch.save({**network.state_dict(), "epoch": 3}, tmp_path / "mixed.pt")
    for name in ("nested.pt", "mixed.pt"):
        assert torch.equal(load(tmp_path / name, arch="cnn8").predict(IMAGES), logits(network))


def test_a_dictionary_that_holds_itself_ends(tmp_path: Path) -> None:
    circle: dict[str, Any] = {}
    circle["model"] = circle
    torch.save(circle, tmp_path / "a.pt")
    assert refusal(tmp_path / "a.pt", arch="cnn8").problem == "the file holds no weights"


def test_what_wrapping_modules_save(network: nn.Module, tmp_path: Path) -> None:
    wrapped = [AveragedModel(network), nn.DataParallel(network), torch.compile(network)]
    for index, module in enumerate(wrapped):
        assert isinstance(module, nn.Module)
        torch.save(module.state_dict(), tmp_path / f"{index}.pt")
        assert torch.equal(load(tmp_path / f"{index}.pt", arch="cnn8").predict(IMAGES), logits(network))


def test_safetensors(network: nn.Module, tmp_path: Path) -> None:
    save_file(network.state_dict(), tmp_path / "a.safetensors")
    assert torch.equal(load(tmp_path / "a.safetensors", arch="cnn8").predict(IMAGES), logits(network))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-100])
    assert refusal(tmp_path / "b.safetensors", arch="cnn8").problem == "the safetensors file cannot be read"


def test_weights_in_half_precision_are_read_as_float32(network: nn.Module, tmp_path: Path) -> None:
    torch.save(copy.deepcopy(network).half().state_dict(), tmp_path / "a.pt")
    loaded = load(tmp_path / "a.pt", arch="cnn8")
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}
    assert torch.allclose(loaded.predict(IMAGES), logits(network), atol=1e-2)


def test_weights_alone_need_the_networks_name(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "a.pt")
    error = refusal(tmp_path / "a.pt")
    assert "the network must be named" in error.problem and "--arch cnn8" in error.fix
    assert "did you mean 'cnn8'" in refusal(tmp_path / "a.pt", arch="cnn").fix


def test_weights_that_do_not_fit_are_named(network: nn.Module, tmp_path: Path) -> None:
    state = dict(network.state_dict())
    state["extra.weight"] = state.pop("0.bias")
    state["2.weight"] = torch.zeros(4, 4)
    torch.save(state, tmp_path / "a.pt")
    error = refusal(tmp_path / "a.pt", arch="cnn8")
    assert error.problem == "the weights do not fit cnn8"
    assert "missing: 0.bias" in error.found and "unexpected: extra.weight" in error.found
    assert "2.weight (4, 4) in the file, (32, 32, 3, 3) in the network" in error.found


def test_another_number_of_classes_does_not_fit(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "a.pt")
    error = refusal(tmp_path / "a.pt", arch="cnn8", classes=7)
    assert "15.weight (10, 128) in the file, (7, 128) in the network" in error.found and "--data" in error.fix


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(network: nn.Module, tmp_path: Path, value: float) -> None:
    state = {key: weight.clone() for key, weight in network.state_dict().items()}
    state["2.bias"][0] = value
    torch.save(state, tmp_path / "a.pt")
    error = refusal(tmp_path / "a.pt", arch="cnn8")
    assert error.problem == "the weights contain NaN or infinity" and error.found == "layers: 2.bias"


def test_a_pickled_module_loads_only_when_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Home()
    torch.save(module, tmp_path / "a.pt")
    error = refusal(tmp_path / "a.pt")
    assert "runs code" in error.problem and "--trust-pickle" in error.fix
    assert capsys.readouterr().err == ""
    assert torch.equal(load(tmp_path / "a.pt", trust_pickle=True).predict(IMAGES), logits(module))
    assert "runs the code" in capsys.readouterr().err


def test_a_checkpoint_of_a_pickled_network_finds_it_again(tmp_path: Path) -> None:
    torch.save(Home(), tmp_path / "home.pt")
    model = load(tmp_path / "home.pt", trust_pickle=True)
    save_checkpoint(model, tmp_path / "model.pt")
    assert torch.equal(load(tmp_path / "model.pt", trust_pickle=True).predict(IMAGES), model.predict(IMAGES))
    (tmp_path / "home.pt").unlink()
    assert "is not there" in refusal(tmp_path / "model.pt", trust_pickle=True).problem


class Trap:
    """Unpickling it would leave a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pathlib.Path.touch, (pathlib.Path("sprung"),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_runs_without_trust(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": network.state_dict(), "args": Trap()}, "a.pt", pickle_protocol=protocol)
    Path("b.pt").write_bytes(pickle.dumps({"state_dict": Trap()}, protocol=protocol))
    for name in ("a.pt", "b.pt"):
        assert "--trust-pickle" in refusal(tmp_path / name, arch="cnn8").fix
    assert not Path("sprung").exists()


def test_a_pickle_that_fails_although_trusted(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"\x80\x02cnot_there\nThing\n.")
    error = refusal(tmp_path / "a.pt", trust_pickle=True)
    assert error.problem == "unpickling the model failed" and "not_there" in error.found


def test_the_harmless_list_gives_no_way_to_call_anything() -> None:
    entries = [entry[0] if isinstance(entry, tuple) else entry for entry in HARMLESS]
    functions = [entry for entry in entries if not isinstance(entry, type)]
    assert {function.__name__ for function in functions} == {"scalar", "_reconstruct"}


def test_torchscript_is_refused_with_what_to_save_instead(network: nn.Module, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # writing the old format is what this test is about
        torch.jit.save(torch.jit.trace(network, IMAGES), tmp_path / "a.pt")  # type: ignore[no-untyped-call]
    error = refusal(tmp_path / "a.pt", arch="cnn8", trust_pickle=True)
    assert "TorchScript" in error.problem and "model.state_dict()" in error.fix


def test_exported_programs_are_refused_with_what_to_save_instead(network: nn.Module, tmp_path: Path) -> None:
    torch.export.save(torch.export.export(network, (IMAGES,)), tmp_path / "a.pt2")
    error = refusal(tmp_path / "a.pt2", arch="cnn8")
    assert ".pt2" in error.problem and "model.state_dict()" in error.fix


def test_onnx_files_folders_missing_and_empty_files(network: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\x08\x07")
    assert "ONNX" in refusal(tmp_path / "a.onnx").problem
    assert refusal(tmp_path).problem == "the model is a folder, not a file"
    torch.save(network.state_dict(), tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in refusal(tmp_path).fix
    assert refusal(tmp_path / "nowhere.pt").problem == "the model file is not there"
    (tmp_path / "empty.pt").touch()
    assert refusal(tmp_path / "empty.pt").problem == "the model file is empty"


def test_truncated_and_foreign_files(network: nn.Module, tmp_path: Path) -> None:
    torch.save(network.state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    torch.save(network.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pt").read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (20, 3000), dtype=np.uint8)
    noise[:, 0] %= 128
    contents = [whole[:-50], whole[: len(whole) // 2], whole[:3], old[: len(old) // 2], b"PK\x03\x04", b"\x89PNG\r\n"]
    contents += [b"lr: 0.1\nepochs: 3\n", b"<html>404</html>", b"{}", b"\x00" * 100, *(row.tobytes() for row in noise)]
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(content)
        error = refusal(path, arch="cnn8", trust_pickle=True)
        assert error.problem == "the model file is truncated or no checkpoint", (number, error)
        assert f"{len(content):,} bytes" in error.found


@pytest.mark.parametrize("content", [{"epoch": 3, "lr": 0.1}, [1, 2], 5, {}, {"optimizer": {"a": torch.zeros(1)}}])
def test_a_file_without_weights(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    assert refusal(tmp_path / "a.pt", arch="cnn8").problem == "the file holds no weights"


def test_a_network_of_other_outputs_or_images(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "def five():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, 5))\n"
        "def other():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))\n"
        "class Picky(torch.nn.Linear):\n"
        "    def __init__(self):\n        super().__init__(144, 10)\n"
        "    def forward(self, image):\n        raise AssertionError\n"
    )
    for name, problem in [("five", "outputs are not"), ("other", "does not take"), ("Picky", "does not take")]:
        weight = {"five": (5, 144), "other": (10, 784), "Picky": (10, 144)}[name]
        prefix = "" if name == "Picky" else "1."
        torch.save({f"{prefix}weight": torch.zeros(weight), f"{prefix}bias": torch.zeros(weight[0])}, tmp_path / "a.pt")
        error = refusal(tmp_path / "a.pt", arch=f"{tmp_path}/net.py:{name}")
        assert problem in error.problem and "--data" in error.fix


def test_a_users_network_keeps_working_from_our_checkpoint_and_can_move(tmp_path: Path) -> None:
    code = "import torch\ndef net(num_classes):\n"
    code += "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, num_classes))\n"
    (tmp_path / "net.py").write_text(code)
    torch.save({"1.weight": torch.rand(10, 144), "1.bias": torch.rand(10)}, tmp_path / "a.pt")
    model = load(tmp_path / "a.pt", arch=f"{tmp_path}/net.py:net")
    save_checkpoint(model, tmp_path / "model.pt")
    assert torch.equal(load(tmp_path / "model.pt").predict(IMAGES), model.predict(IMAGES))
    (tmp_path / "net.py").rename(tmp_path / "moved.py")
    assert "--arch" in refusal(tmp_path / "model.pt").fix
    moved = load(tmp_path / "model.pt", arch=f"{tmp_path}/moved.py:net")
    assert torch.equal(moved.predict(IMAGES), model.predict(IMAGES))


@pytest.mark.parametrize(
    ("answer", "kind"), [("{'logits': logits}", "dict"), ("(logits, logits)", "tuple"), ("[logits]", "list")]
)
def test_a_network_that_returns_more_than_logits(tmp_path: Path, answer: str, kind: str) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self):\n        super().__init__(144, 10)\n"
        "    def forward(self, image):\n"
        f"        logits = super().forward(image.flatten(1))\n        return {answer}\n"
    )
    torch.save({"weight": torch.zeros(10, 144), "bias": torch.zeros(10)}, tmp_path / "a.pt")
    error = refusal(tmp_path / "a.pt", arch=f"{tmp_path}/net.py:Net")
    assert error.problem == "the network's output is no tensor of logits"
    assert f"forward() returns a {kind}" in error.found and error.fix == "return the logits alone"
