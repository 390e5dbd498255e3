"""From an architecture's name to a freshly initialised network."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torchvision
from torch import nn

from toolkit.errors import ToolkitError, unknown_name
from toolkit.models.networks import cnn8, resnet18

Builder = Callable[[int, tuple[int, int, int]], nn.Module]

ARCHITECTURES: Mapping[str, Builder] = {"cnn8": cnn8, "resnet18": resnet18}
AUXILIARY: Mapping[str, Mapping[str, bool]] = {
    name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")
}
"""torchvision's networks that have more than one output in training, unless told not to."""
GRIDS: Mapping[str, int] = {
    **{f"vit_{kind}": int(kind[2:]) for kind in ("b_16", "b_32", "l_16", "l_32", "h_14")},
    "maxvit_t": 224,
}
"""Of what torchvision's networks of a fixed grid need the image's side to be a multiple: a patch, or MaxViT's
partitions of 7 after five halvings."""


def build_network(architecture: str, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Build a network of `classes` outputs for images of `input_shape` = (channels, height, width).

    Args:
        architecture: `cnn8`, `resnet18`, `torchvision:NAME` or `path/to/file.py:callable`.

    Raises:
        ToolkitError: unknown name, or user code that fails or returns no module.
    """
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture](classes, input_shape)
    if architecture.startswith("torchvision:"):
        return _from_torchvision(architecture.removeprefix("torchvision:"), classes, input_shape)
    if ".py:" in architecture:
        return _from_file(architecture, classes, input_shape)
    raise unknown_name("architecture", architecture, [*ARCHITECTURES, "torchvision:NAME", "path/to/file.py:callable"])


def code_digest(architecture: str) -> str | None:
    """SHA-256 of the text of a user's own network, without what that imports; None of networks by name."""
    path = Path(architecture.rpartition(":")[0])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _from_torchvision(name: str, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise unknown_name("torchvision network", name, known)
    if input_shape[0] != 3:
        raise ToolkitError(
            f"torchvision:{name} takes RGB images",
            found=f"images of {input_shape[0]} channel(s)",
            fix="use RGB images, or `--arch cnn8`, or your own network as path/to/file.py:callable",
        )
    options = {**AUXILIARY.get(name, {}), **_size_options(name, input_shape)}
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=classes, **options)
    return network


def _size_options(name: str, input_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Transformers of a fixed grid are built for the size of the images."""
    if name not in GRIDS:
        return {}
    _, height, width = input_shape
    if height != width or height % GRIDS[name]:
        raise ToolkitError(
            f"torchvision:{name} takes square images whose side is a multiple of {GRIDS[name]}",
            found=f"images of {height}x{width}",
            fix=f"resize an image folder with --size {max(1, round(height / GRIDS[name])) * GRIDS[name]}, "
            "or name another network",
        )
    return {"input_size": (height, width)} if name == "maxvit_t" else {"image_size": height}


def _from_file(architecture: str, classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    location, _, name = architecture.rpartition(":")
    path = Path(location)
    if not path.is_file():
        raise ToolkitError(
            "the architecture's file is not there", found=str(path), fix="correct `--arch path/to/file.py:callable`"
        )
    with import_folder(path.resolve().parent):
        builder = getattr(_import_file(path), name, None)
        if not callable(builder):
            raise ToolkitError(
                f"{path.name} has no callable '{name}'", found=architecture, fix="name a function or class in that file"
            )
        network = _call(builder, architecture, {"num_classes": classes, "in_channels": input_shape[0]})
    if not isinstance(network, nn.Module):
        raise ToolkitError(
            f"'{name}' returns no network",
            found=f"{type(network).__name__} instead of torch.nn.Module",
            fix="let it return the module itself",
        )
    return network


def _import_file(path: Path) -> object:
    """Import `path` as a member of a package of its own that stands for its folder, so `from .layers import` works."""
    folder = path.resolve().parent
    package = f"_user_network_{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    module_name = f"{package}.{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ToolkitError("the architecture's file is no Python module", found=str(path), fix="name a .py file")
    parent = types.ModuleType(package)
    parent.__path__ = [str(folder)]
    module = importlib.util.module_from_spec(spec)
    sys.modules.update({package: parent, module_name: module})
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise _user_code_error(f"importing {path.name} failed", error) from error
    return module


def _call(builder: Callable[..., object], architecture: str, offered: dict[str, Any]) -> object:
    """Call user code with those of the offered arguments that it has parameters for."""
    try:
        parameters = inspect.signature(builder).parameters
        return builder(**{key: value for key, value in offered.items() if key in parameters})
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise _user_code_error(f"calling {architecture} failed", error) from error


def _user_code_error(problem: str, error: BaseException) -> ToolkitError:
    return ToolkitError(problem, found=f"{type(error).__name__}: {error}", fix="correct the file; it is your own code")


@contextlib.contextmanager
def import_folder(folder: Path) -> Iterator[None]:
    """Put `folder` first on the import path, and hide what would shadow its modules: our own package, and modules of
    one name from the folder of another network.

    Networks built meanwhile keep their modules; afterwards the path and what was hidden are as before.
    """
    own = {entry.stem for entry in folder.iterdir() if entry.suffix == ".py" or entry.is_dir()}
    shadowing = {name for name in own & set(sys.modules) if name == "toolkit" or not _installed(name)}
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in shadowing}
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.split(".")[0] in shadowing]:
            del sys.modules[name]
        sys.modules.update(hidden)


def _installed(name: str) -> bool:
    """Whether the imported module `name` belongs to Python or to an installed package."""
    file = getattr(sys.modules[name], "__file__", None)
    places = [sysconfig.get_path(place) for place in ("stdlib", "platstdlib", "purelib", "platlib")]
    return file is None or any(Path(file).is_relative_to(place) for place in places)
