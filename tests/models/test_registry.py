from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch

import toolkit
from toolkit.errors import ToolkitError
from toolkit.models.networks import cnn8, resnet18
from toolkit.models.registry import build_network

GREY_SHAPE = (1, 28, 28)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text), encoding="utf-8")


def a_folder(root: Path, name: str, files: dict[str, str]) -> Path:
    write(root / name, files)
    return root / name


def width_of(network: torch.nn.Module) -> int:
    assert isinstance(network, torch.nn.Linear)
    return network.in_features


def test_cnn8_is_the_papers_network() -> None:
    network = cnn8()
    assert sum(parameter.numel() for parameter in network.parameters()) == 549_994
    assert network(torch.zeros(3, *GREY_SHAPE)).shape == (3, 10)
    assert cnn8(4, (3, 30, 17))(torch.zeros(2, 3, 30, 17)).shape == (2, 4)


def test_resnet18_keeps_the_resolution_of_its_stem() -> None:
    network = resnet18(7, (1, 32, 32))
    seen: list[torch.Size] = []
    network.get_submodule("layer1").register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert seen == [torch.Size([2, 64, 32, 32])]
    assert sum(p.numel() for p in resnet18().parameters()) == 11_173_962  # He et al.'s CIFAR form, ten classes


def test_names_of_ours_and_of_torchvision() -> None:
    assert build_network("cnn8", 3, GREY_SHAPE)(torch.zeros(1, *GREY_SHAPE)).shape == (1, 3)
    network = build_network("torchvision:squeezenet1_1", 5, (3, 64, 64)).eval()
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_an_unknown_architecture_gets_the_nearest_name() -> None:
    with pytest.raises(ToolkitError) as caught:
        build_network("resnet-18", 10, GREY_SHAPE)
    assert caught.value.problem == "unknown architecture"
    assert "did you mean 'resnet18'?" in caught.value.fix and "torchvision:NAME" in caught.value.fix
    with pytest.raises(ToolkitError, match="unknown torchvision network") as caught:
        build_network("torchvision:mobilenetv3", 10, (3, 32, 32))
    assert "did you mean 'mobilenet_v" in caught.value.fix


@pytest.mark.parametrize(("name", "side"), [("vit_b_16", 64), ("vit_b_32", 96), ("vit_l_16", 16), ("vit_h_14", 28)])
def test_vision_transformers_are_built_for_the_size_of_the_images(name: str, side: int) -> None:
    with torch.device("meta"):
        network = build_network(f"torchvision:{name}", 5, (3, side, side)).eval()
        assert network(torch.zeros(1, 3, side, side)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "shape", "found", "size"),
    [
        ("vit_b_16", (3, 70, 70), "70x70", "--size 64"),
        ("vit_b_16", (3, 64, 32), "64x32", "--size 64"),
        ("vit_b_32", (3, 8, 8), "8x8", "--size 32"),
        ("maxvit_t", (3, 64, 64), "64x64", "--size 224"),
    ],
)
def test_images_that_do_not_fit_a_transformers_grid(
    name: str, shape: tuple[int, int, int], found: str, size: str
) -> None:
    with pytest.raises(ToolkitError, match="square images whose side is a multiple of") as caught:
        build_network(f"torchvision:{name}", 5, shape)
    assert found in caught.value.found and size in caught.value.fix


def test_maxvit_is_built_for_the_size_of_the_images() -> None:
    with torch.device("meta"):
        build_network("torchvision:maxvit_t", 5, (3, 448, 448))


def test_torchvision_refuses_grey_images() -> None:
    with pytest.raises(ToolkitError, match="takes RGB images") as caught:
        build_network("torchvision:resnet18", 10, GREY_SHAPE)
    assert "1 channel" in caught.value.found


def test_a_users_file_imports_from_its_own_folder(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "net.py": """
                import torch
                from parts.sizes import WIDTH
                from .neighbour import layer
                def build(num_classes, in_channels):
                    assert WIDTH == 5
                    return layer(in_channels, num_classes)
            """,
            "parts/__init__.py": "",
            "parts/sizes.py": "WIDTH = 5",
            "neighbour.py": """
                import torch
                def layer(inputs, outputs):
                    return torch.nn.Linear(inputs, outputs)
            """,
        },
    )
    path = list(sys.path)
    network = build_network(f"{tmp_path}/net.py:build", 4, GREY_SHAPE)
    assert isinstance(network, torch.nn.Linear) and (network.in_features, network.out_features) == (1, 4)
    assert sys.path == path


def test_folders_with_a_package_of_the_same_name_do_not_shadow_each_other(tmp_path: Path) -> None:
    for width in (3, 5):
        text = "import torch\nfrom models.sizes import WIDTH\nfrom utils import same\ndef build():\n"
        text += "    return torch.nn.Linear(same(WIDTH), 2)\n"
        files = {"net.py": text, "models/sizes.py": f"WIDTH = {width}", "utils.py": "def same(x):\n    return x\n"}
        folder = a_folder(tmp_path, str(width), {**files, "models/__init__.py": ""})
        assert width_of(build_network(f"{folder}/net.py:build", 10, GREY_SHAPE)) == width


def test_a_users_own_toolkit_package_is_not_shadowed_by_ours(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "net.py": """
                from toolkit.errors import WIDTH
                import torch
                def build():
                    return torch.nn.Linear(WIDTH, 2)
            """,
            "toolkit/__init__.py": "",
            "toolkit/errors.py": "WIDTH = 7",
        },
    )
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "toolkit"}
    assert width_of(build_network(f"{tmp_path}/net.py:build", 10, GREY_SHAPE)) == 7
    assert {name: module for name, module in sys.modules.items() if name.split(".")[0] == "toolkit"} == ours
    import toolkit as again

    assert again is toolkit


def test_installed_packages_are_not_replaced_by_a_folder_of_their_name(tmp_path: Path) -> None:
    torch_before = sys.modules["torch"]
    write(tmp_path, {"net.py": "import torch\ndef build():\n    return torch.nn.Linear(2, 2)\n", "torch/x.py": ""})
    build_network(f"{tmp_path}/net.py:build", 10, GREY_SHAPE)
    assert sys.modules["torch"] is torch_before


@pytest.mark.parametrize(
    ("text", "name", "problem", "found"),
    [
        ("raise KeyError('lost')", "build", "importing net.py failed", "KeyError: 'lost'"),
        ("import sys\nsys.exit(2)", "build", "importing net.py failed", "SystemExit: 2"),
        ("def build(:", "build", "importing net.py failed", "SyntaxError"),
        ("import not_there_at_all", "build", "importing net.py failed", "ModuleNotFoundError"),
        ("def build():\n    raise ValueError('no weights')", "build", "calling", "ValueError: no weights"),
        ("def build(depth):\n    pass", "build", "calling", "missing 1 required positional argument: 'depth'"),
        ("def build():\n    return {}", "build", "'build' returns no network", "dict instead of torch.nn.Module"),
        ("x = 1", "build", "net.py has no callable 'build'", "net.py:build"),
        ("build = 3", "build", "net.py has no callable 'build'", "net.py:build"),
    ],
)
def test_user_code_that_fails(tmp_path: Path, text: str, name: str, problem: str, found: str) -> None:
    (tmp_path / "net.py").write_text(text)
    with pytest.raises(ToolkitError) as caught:
        build_network(f"{tmp_path}/net.py:{name}", 10, GREY_SHAPE)
    assert problem in caught.value.problem and found in caught.value.found and caught.value.fix


def test_a_users_file_that_is_not_there() -> None:
    with pytest.raises(ToolkitError, match="architecture's file is not there") as caught:
        build_network("nowhere/net.py:build", 10, GREY_SHAPE)
    assert "--arch" in caught.value.fix
