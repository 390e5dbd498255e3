"""Files as users have them: names that are not UTF-8, links, colours, checkpoints of other programs, pickles."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from tests import tiny
from tests.toys import wrap
from toolkit import bundle, cli
from toolkit.artifacts import ModelSpec, Normalization
from toolkit.config import DataConfig, ModelConfig
from toolkit.data import images as folder_images
from toolkit.data.images import FolderImages
from toolkit.data.sources import load_source
from toolkit.errors import ToolkitError
from toolkit.models.checkpoint import save_checkpoint
from toolkit.models.loading import PREFIXES, CodeNeededError, assemble, check_outputs, read_model_file

HALF = Normalization((0.5,), (0.5,))
CAFE = os.fsdecode(b"caf\xe9")


def write_images(folder: Path, count: int = 4, *, colour: tuple[int, ...] = ()) -> None:
    """Grey squares of 8 pixels; those of the given numbers are red."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        grey = Image.fromarray(np.full((8, 8), 10 * number, np.uint8))
        image = Image.new("RGB", (8, 8), (200, 0, 0)) if number in colour else grey
        image.save(folder / f"{number:03}.png")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_names_that_are_not_utf8_are_refused_before_any_work(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / CAFE)
    with pytest.raises(ToolkitError, match="name is not UTF-8") as caught:
        FolderImages(tmp_path / "train")
    assert r"caf\udce9" in caught.value.found
    with pytest.raises(ToolkitError, match="name is not UTF-8"):
        load_source(DataConfig(source=f"npz:{CAFE}.npz"))
    with pytest.raises(ToolkitError, match="name is not UTF-8"):
        read_model_file(tmp_path / f"{CAFE}.pt")


def test_folders_below_a_class_may_be_links_even_in_a_ring(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 3)
    write_images(tmp_path / "train" / "b", 2)
    write_images(tmp_path / "elsewhere", 5)
    (tmp_path / "train" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "a" / "ring").symlink_to(tmp_path / "train" / "a")
    found = FolderImages(tmp_path / "train")
    assert np.bincount(found.labels).tolist() == [8, 2]


def test_a_folder_below_a_class_that_cannot_be_opened_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "train" / "a" / "below")
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ToolkitError, match="folder of images cannot be opened") as caught:
        FolderImages(tmp_path / "train")
    assert "below: Permission denied" in caught.value.found


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_colours_among_many_grey_images_are_told(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(folder_images, "SAMPLED", 2)  # the first and the last
    write_images(tmp_path / "train" / "a", 9, colour=(2, 4))
    found = FolderImages(tmp_path / "train", memory_limit=limit)
    found.pixels(np.arange(9))
    said = " ".join(capsys.readouterr().err.split())
    assert found.shape[0] == 1
    assert said.count("2 of 9 images are in colour and are read as grey: a/002.png, a/004.png") == 1


class Versioned(nn.Linear):
    """Reads its version when it is loaded, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"version {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


VERSIONED = """
from tests.test_users_files import Versioned
from torch import nn


def net(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), Versioned(256, num_classes))
"""


def test_networks_that_read_their_version_are_trained_and_loaded(tmp_path: Path) -> None:
    (tmp_path / "versioned.py").write_text(VERSIONED)
    tiny.write_archive(tmp_path / "data.npz")
    with tiny.working_folder(tmp_path):
        how = ("--data", "npz:data.npz", "--epochs", "1", "-q")
        assert tiny.run("train", "versioned.py:net", *how, "-o", "model.pt") == cli.DONE
        assert tiny.run("export", "model.pt", "-q") == cli.DONE


NET = """
from torch import nn


class Net(nn.Sequential):
    def forward(self, x):
        return self[0](x.flatten(1))


def net(num_classes, in_channels):
    return Net(nn.Linear(64, num_classes))
"""


def linear(path: Path) -> dict[str, Tensor]:
    state = {"0.weight": torch.randn(2, 64), "0.bias": torch.zeros(2)}
    path.write_text(NET)
    return state


def load(path: Path, arch: str) -> nn.Module:
    shape = (1, 8, 8)
    file = read_model_file(path, arch=arch)
    made = assemble(file, arch=arch, class_names=("a", "b"), input_shape=shape, normalization=HALF, dataset=None)
    return made.network


@pytest.mark.parametrize(
    ("prefix", "beside"), [("backbone.", ()), ("model.", ("criterion.weight",)), ("net.inner.", ("step", "head.bias"))]
)
def test_the_network_is_found_among_the_other_modules_of_a_training_script(
    prefix: str, beside: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = linear(tmp_path / "net.py")
    wrapped = {f"{prefix}{name}": value for name, value in state.items()} | {name: torch.ones(3) for name in beside}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "last.ckpt")
    network = load(tmp_path / "last.ckpt", f"{tmp_path / 'net.py'}:net")
    assert torch.equal(network.state_dict()["0.weight"], state["0.weight"])
    said = f"those below '{prefix}'; {len(beside)} other entries"
    assert said in " ".join(capsys.readouterr().err.split()) or prefix in PREFIXES


def test_several_networks_in_one_file_are_named(tmp_path: Path) -> None:
    state = linear(tmp_path / "net.py")
    both = {f"{prefix}.{name}": value for prefix in ("student", "teacher") for name, value in state.items()}
    torch.save(both, tmp_path / "both.pt")
    with pytest.raises(ToolkitError, match="several networks") as caught:
        load(tmp_path / "both.pt", f"{tmp_path / 'net.py'}:net")
    assert caught.value.found == "weights below student., teacher."


def test_a_pickled_network_may_be_named_by_its_code(tmp_path: Path) -> None:
    """Where the pickle is gone, or may not run."""
    state = linear(tmp_path / "net.py")
    spec = ModelSpec(f"pickle:{tmp_path / 'gone.pt'}", ("a", "b"), (1, 8, 8), HALF)
    model = wrap(nn.Sequential(nn.Linear(64, 2)), classes=2, shape=(1, 8, 8))
    model.network.load_state_dict(state)
    save_checkpoint(type(model)(model.module, spec), tmp_path / "model.pt")
    with pytest.raises(CodeNeededError, match="not there"):
        read_model_file(tmp_path / "model.pt")
    network = load(tmp_path / "model.pt", f"{tmp_path / 'net.py'}:net")
    assert torch.equal(network.state_dict()["0.weight"], state["0.weight"])


def test_a_network_that_ends_in_a_sigmoid_is_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.Sigmoid())
    with pytest.raises(ToolkitError, match="returns sigmoids"):
        check_outputs(wrap(network, classes=2, shape=(1, 8, 8)), "here")


def test_what_torch_cannot_open_is_no_full_disk(tmp_path: Path) -> None:
    for number, problem in ((13, "output cannot be written"), (28, "disk is full")):
        error = RuntimeError(
            f"[enforce fail at inline_container.cc:664] . open file failed with strerror: {os.strerror(number)}\nframe"
        )
        told = bundle.disk_error(error, tmp_path / "model.pt")
        assert told is not None and problem in told.problem and "frame" not in told.found


def test_an_output_of_too_long_a_name_is_bad_input(tmp_path: Path) -> None:
    tiny.write_archive(tmp_path / "data.npz")
    (tmp_path / "net.py").write_text(tiny.NETWORK)
    (tmp_path / "layers.py").write_text(tiny.LAYERS)
    with tiny.working_folder(tmp_path):
        how = ("--data", "npz:data.npz", "--epochs", "1", "-q", "-o", f"{'n' * 254}.pt")
        assert tiny.run("train", "net.py:net", *how) == cli.BAD_INPUT


@pytest.mark.parametrize("mean", ["123.675,116.28,103.53", "33.3"])
def test_means_for_pixels_up_to_255_are_refused(mean: str) -> None:
    with pytest.raises(ValidationError, match=r"divide what is for 0 to 255 by 255"):
        ModelConfig(path=Path("m.pt"), mean=tuple(map(float, mean.split(","))))
    assert ModelConfig(path=Path("m.pt"), mean=(0.485, -0.5, 3.0)).mean == (0.485, -0.5, 3.0)


def test_the_home_folder_is_found_where_a_shell_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert DataConfig(source="folder:~/images").source == "folder:/home/me/images"
    assert DataConfig(source="cifar10").source == "cifar10"


def test_the_next_command_can_be_typed_whatever_the_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_archive(tmp_path / "data.npz")
    (tmp_path / "net.py").write_text(tiny.NETWORK)
    (tmp_path / "layers.py").write_text(tiny.LAYERS)
    with tiny.working_folder(tmp_path):
        how = ("--data", "npz:data.npz", "--epochs", "1", "-o", "my model.pt")
        assert tiny.run("train", "net.py:net", *how) == cli.DONE
        (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("next:"))
        assert shlex.split(line)[3] == "my model.pt"


def test_a_terminal_that_cannot_show_a_name_ends_no_command(tmp_path: Path) -> None:
    (tmp_path / "ö").mkdir()
    command = [sys.executable, "-m", "toolkit", "report", str(tmp_path / "ö")]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert done.returncode == cli.BAD_INPUT, done.stderr
    assert b"Unicode" not in done.stderr and b"\\xf6" in done.stderr
