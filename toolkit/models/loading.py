"""From a model file to a `TorchModel`, without running code that hides in it."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import types
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core import multiarray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from toolkit.artifacts import HashArray, ModelSpec, Normalization, Normalized, TorchModel, versioned
from toolkit.errors import ToolkitError, unknown_name
from toolkit.models.checkpoint import is_checkpoint, parse_checkpoint
from toolkit.models.registry import build_network, import_folder
from toolkit.paths import is_text
from toolkit.progress import notice, warn
from toolkit.pruning import replay

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "ema", "module", "params", "weights")
"""Keys under which training scripts put the weights."""
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""What DataParallel, torch.compile and wrapping modules put before every key."""
MAX_NESTING = 4
"""Wrappers within wrappers that are opened."""
PICKLED = "pickle:"
"""Architecture prefix of a network that only its pickled file can rebuild."""

HARMLESS: list[Any] = [
    argparse.Namespace,
    types.SimpleNamespace,
    *((pathlib.PurePath, f"pathlib.{kind}") for kind in ("PosixPath", "WindowsPath", "PurePosixPath")),
    *((multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in "?bhilqBHILQefd"),
]
"""What training scripts save beside the weights and what runs no code when it is unpickled."""

STATISTICS = ("running_mean", "running_var")
"""Ends of the names of what batch norm has measured."""

SUMS_TO_ONE = 1e-4
"""So near to 1 is the sum of probabilities."""
SAVE_INSTEAD = "save it with torch.save(model.state_dict(), 'model.pt') and name the network with --arch"


SHIPPED = "shipped:"
"""Path prefix of the networks that come with the package."""
WEIGHTS = Path(__file__).parent / "weights"


def resolve_path(path: Path) -> Path:
    """The file that `path` names; `shipped:NAME` is one that comes with the package.

    Raises:
        ToolkitError: no shipped network has that name.
    """
    if not str(path).startswith(SHIPPED):
        return path
    name = str(path).removeprefix(SHIPPED)
    if not (WEIGHTS / f"{name}.pt").is_file():
        raise unknown_name("shipped network", name, [file.stem for file in WEIGHTS.glob("*.pt")])
    return WEIGHTS / f"{name}.pt"


class CodeNeededError(ToolkitError):
    """A network is code of the user's, which is not there or may not run."""


@dataclass(frozen=True)
class ModelFile:
    """What a file holds: our checkpoint (spec and state), a bare state dict, or a pickled module."""

    path: Path
    state: Mapping[str, Tensor]
    spec: ModelSpec | None = None
    module: nn.Module | None = None
    training_hashes: HashArray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))


def read_model_file(path: Path, *, trust_pickle: bool = False, arch: str | None = None) -> ModelFile:
    """Read a checkpoint, state dict (.pt, .pth, .safetensors) or, with `trust_pickle`, a pickled module.

    Args:
        path: the file.
        trust_pickle: whether code in it may run.
        arch: where the network's code lies, if it does not come from the pickled module that a checkpoint names.

    Raises:
        ToolkitError: missing, empty, truncated, not a checkpoint, TorchScript, .pt2, ONNX, or untrusted pickle.
    """
    _refuse_other_formats(path)
    if path.suffix == ".safetensors":
        try:
            return ModelFile(path, load_file(path))
        except (SafetensorError, OSError) as error:
            unreadable = not os.access(path, os.R_OK)
            raise ToolkitError(
                "the safetensors file cannot be read",
                found=f"{path}: {'permission denied' if unreadable else error}",
                fix="make it readable" if unreadable else "copy it again",
            ) from error
    content = _load(path, trust_pickle)
    if is_checkpoint(content):
        assert isinstance(content, dict)
        spec, state, hashes = parse_checkpoint(content, path)
        module = None
        if spec.architecture.startswith(PICKLED) and ".py:" not in (arch or ""):
            module = _rebuild_pickled(Path(spec.architecture.removeprefix(PICKLED)), trust_pickle)
        return ModelFile(path, state, spec, module, hashes)
    if isinstance(content, nn.Module):
        return ModelFile(path, content.state_dict(), module=content)
    return ModelFile(path, _unwrap(content, path))


def _refuse_other_formats(path: Path) -> None:
    if not is_text(str(path)):
        raise ToolkitError(
            "the model file's name is not UTF-8, so that no report could name it",
            found=ascii(str(path)),
            fix="rename it, or the folder that it lies in",
        )
    if path.is_dir():
        inside = path / "model.pt"
        fix = f"name {inside}" if inside.is_file() else "name the checkpoint file inside it"
        raise ToolkitError("the model is a folder, not a file", found=str(path), fix=fix)
    if not path.is_file():
        fix = "correct the path, or train one: `toolkit train cnn8 --data sample --output model.pt`"
        raise ToolkitError("the model file is not there", found=str(path), fix=fix)
    if not os.access(path, os.R_OK):
        raise ToolkitError("the model file may not be read", found=f"{path}: permission denied", fix="make it readable")
    if path.stat().st_size == 0:
        raise ToolkitError("the model file is empty", found=f"{path}: 0 bytes", fix="save or copy it again")
    if path.suffix == ".onnx":
        raise ToolkitError(
            "an ONNX file cannot be trained",
            found=str(path),
            fix="name the PyTorch checkpoint that it was exported from",
        )
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name.split("/", 1)[-1] for name in archive.namelist()]
        if any(name.startswith("code/") for name in names) and "constants.pkl" in names:
            raise ToolkitError("TorchScript files cannot be pruned or trained", found=str(path), fix=SAVE_INSTEAD)
        if "archive_format" in names or any(name.startswith("models/") for name in names):
            raise ToolkitError(
                "torch.export files (.pt2) cannot be pruned or trained", found=str(path), fix=SAVE_INSTEAD
            )


def _load(path: Path, trust_pickle: bool) -> object:
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it cannot read is an error below
            content: object = torch.load(path, map_location="cpu", weights_only=True)
        return content
    except pickle.UnpicklingError as error:
        if not _is_pickle(path) or "Unsupported" not in str(error):
            raise _not_a_checkpoint(path, error) from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, IndexError, OSError, TypeError) as error:
        raise _not_a_checkpoint(path, error) from error
    if not trust_pickle:
        raise CodeNeededError(
            "the file holds pickled Python objects, and loading those runs code",
            found=str(path),
            fix="save a state dict instead, or pass --trust-pickle if you trust whoever made the file",
        )
    warn(f"unpickling {path} runs the code that it contains")
    try:
        with import_folder(path.resolve().parent):
            return torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:  # unpickling runs foreign code, which may raise anything
        raise ToolkitError(
            "unpickling the model failed", found=f"{path}: {type(error).__name__}: {error}", fix=SAVE_INSTEAD
        ) from error


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO or zipfile.is_zipfile(path)


def _not_a_checkpoint(path: Path, error: Exception) -> ToolkitError:
    reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
    return ToolkitError(
        "the model file is truncated or no checkpoint",
        found=f"{path} ({path.stat().st_size:,} bytes): {reason}",
        fix="copy it again, or save it with torch.save(model.state_dict(), 'model.pt')",
    )


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside the usual wrappers of training scripts."""
    for _ in range(MAX_NESTING):
        if not isinstance(content, Mapping):
            break
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return {str(key): value for key, value in content.items()}
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), (Mapping, nn.Module))), None)
        if inner is None:
            beside = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
            if any("." in key for key in beside):
                return beside  # weights with the epoch and its like among them
            break
        content = inner.state_dict() if isinstance(inner, nn.Module) else inner
    keys = list(content)[:5] if isinstance(content, Mapping) else []
    raise ToolkitError(
        "the file holds no weights",
        found=f"{path}: {type(content).__name__}" + (f" with keys {keys}" if keys else ""),
        fix=SAVE_INSTEAD,
    )


def _rebuild_pickled(path: Path, trust_pickle: bool) -> nn.Module:
    if not path.is_file():
        raise CodeNeededError(
            "the checkpoint's network comes from a pickled module that is not there",
            found=str(path),
            fix="put that file back, or name the network's code with --arch path/to/file.py:callable",
        )
    module = read_model_file(path, trust_pickle=trust_pickle).module
    if module is None:
        raise ToolkitError("the file holds no pickled module", found=str(path), fix=SAVE_INSTEAD)
    return module


def assemble(
    file: ModelFile,
    *,
    arch: str | None,
    class_names: tuple[str, ...],
    input_shape: tuple[int, int, int],
    normalization: Normalization,
    dataset: str | None,
) -> TorchModel:
    """Build the network that `file` describes and load its weights.

    A checkpoint of ours describes itself: of the arguments only `arch` is used, to say where its code lies now.

    Raises:
        ToolkitError: no architecture, or weights that do not fit it.
    """
    spec = file.spec
    if spec is None:
        architecture = arch or (f"{PICKLED}{file.path}" if file.module is not None else None)
        if architecture is None:
            raise ToolkitError(
                "the file holds weights alone, so the network must be named",
                found=str(file.path),
                fix="pass --arch cnn8, resnet18, torchvision:NAME or path/to/file.py:callable",
            )
        spec = ModelSpec(architecture, class_names, input_shape, normalization, dataset)
    elif arch is not None and ".py:" in arch:
        spec = replace(spec, architecture=arch)
    if spec.architecture.startswith(PICKLED):
        if file.module is None:
            raise ToolkitError("the network is pickled", found=str(file.path), fix="pass --trust-pickle")
        network = file.module
    else:
        network = build_network(spec.architecture, len(spec.class_names), spec.input_shape)
    network = network.float()
    for entry in spec.pruning:
        if not isinstance(entry, Mapping) or "history" not in entry:
            raise ToolkitError(
                "the checkpoint is damaged",
                found=f"{file.path}: its pruning is told as {str(entry)[:80]!r}",
                fix="use another copy of it",
            )
        network = replay(network, entry["history"], spec.input_shape)
    _load_state(network, file.state, file.path, spec.architecture)
    module = Normalized(network, spec.normalization).eval()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    model = TorchModel(module, spec, file.training_hashes)
    check_outputs(model, str(file.path))
    return model


def strip_prefixes(state: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Take `module.` and its like off every key, as long as the network itself does not have them."""
    stripped = {key: value for key, value in state.items() if key != "n_averaged" or key in wanted}
    while stripped:
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in stripped)), None)
        if prefix is None or any(key.startswith(prefix) for key in wanted):
            break
        stripped = {key.removeprefix(prefix): value for key, value in stripped.items()}
    return stripped if wanted & set(stripped) else _part(state, wanted)


def _part(state: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """The weights below one prefix, as a training script keeps the network among other modules; else all of them.

    Raises:
        ToolkitError: there are several such networks.
    """
    needed = {key for key in wanted if not key.endswith("num_batches_tracked")}
    first = min(needed, default="")
    prefixes = sorted(key.removesuffix(first) for key in state if first and key.endswith(f".{first}"))
    fitting = [prefix for prefix in prefixes if all(f"{prefix}{key}" in state for key in needed)]
    if len(fitting) > 1:
        raise ToolkitError(
            "the file holds several networks of that architecture",
            found=f"weights below {', '.join(fitting)}",
            fix="save one of them: torch.save(network.state_dict(), 'model.pt')",
        )
    if not fitting:
        return dict(state)
    part = {key.removeprefix(fitting[0]): value for key, value in state.items() if key.startswith(fitting[0])}
    notice(f"the network's weights are those below '{fitting[0]}'; {len(state) - len(part)} other entries are not used")
    return part


def _load_state(network: nn.Module, state: Mapping[str, Tensor], path: Path, architecture: str) -> None:
    wanted = network.state_dict()
    found = strip_prefixes(state, set(wanted))
    optional = {key for key in wanted if key.endswith("num_batches_tracked")}
    missing = sorted(set(wanted) - set(found) - optional)
    unexpected = sorted(set(found) - set(wanted))
    shapes = [
        f"{key} {tuple(found[key].shape)} in the file, {tuple(wanted[key].shape)} in the network"
        for key in sorted(set(wanted) & set(found))
        if found[key].shape != wanted[key].shape
    ]
    if missing or unexpected or shapes:
        parts = [_sample("missing", missing), _sample("unexpected", unexpected), _sample("other shapes", shapes)]
        raise ToolkitError(
            f"the weights do not fit {architecture}",
            found=f"{path}: " + "; ".join(part for part in parts if part),
            fix="name the network they were trained in with --arch, and the data set (its classes) with --data",
        )
    floats = sorted(key for key in set(wanted) & set(found) if wanted[key].is_floating_point())
    rounded = [key for key in floats if not found[key].is_floating_point()]
    if rounded:
        raise ToolkitError(
            "the file holds whole numbers where the network has floats",
            found=f"{path}: {_sample('layers', rounded)}",
            fix="use the weights of before the network was quantised",
        )
    masks = _infinite_buffers(network)
    broken = [
        key
        for key, value in found.items()
        if key not in masks and value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if broken:
        raise ToolkitError(
            "the weights contain NaN or infinity", found=_sample("layers", broken), fix="use an earlier checkpoint"
        )
    network.load_state_dict(versioned(found, network), strict=False)


def _infinite_buffers(network: nn.Module) -> set[str]:
    """Buffers that hold infinity by design, as the mask of an attention; the statistics of batch norm never do."""
    return {
        name
        for name, value in network.named_buffers()
        if bool(value.isinf().any()) and not bool(value.isnan().any()) and not name.endswith(STATISTICS)
    }


def _sample(label: str, items: list[str]) -> str:
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return f"{label}: {', '.join(items[:5])}{more}" if items else ""


def check_outputs(model: TorchModel, where: str) -> None:
    """One forward pass: the network takes its images and gives one logit per class.

    Args:
        model: on the CPU and in evaluation mode.
        where: the network comes from: its file, or its architecture's name.

    Raises:
        ToolkitError: it does not.
    """
    shape, classes = model.spec.input_shape, len(model.spec.class_names)
    try:
        with torch.inference_mode():
            output: object = model.module(torch.full((2, *shape), 0.5))
    except Exception as error:  # user code may raise anything, torchvision raises AssertionError
        raise ToolkitError(
            "the network does not take the data set's images",
            found=f"{where}: images {list(shape)}: {str(error).partition(chr(10))[0]}",
            fix="name the data set that the network is made for with --data (and --size), or another network",
        ) from error
    if not isinstance(output, Tensor):
        raise ToolkitError(
            "the network's output is no tensor of logits",
            found=f"{where}: forward() returns a {type(output).__name__}",
            fix="return the logits alone",
        )
    if tuple(output.shape) != (2, classes):
        raise ToolkitError(
            "the network's outputs are not the data set's classes",
            found=f"{where}: output {list(output.shape)[1:]}, {classes} classes",
            fix="name the data set that the network is made for with --data",
        )
    if _ends_in_sigmoid(model, shape):
        raise ToolkitError(
            "the network returns sigmoids",
            found=f"{where}: forward() ends in a sigmoid",
            fix="return the logits: leave the sigmoid at the end of forward() away; labels stay the same",
        )
    if bool((output >= 0).all()) and bool(((output.float().sum(1) - 1).abs() < SUMS_TO_ONE).all()):
        raise ToolkitError(
            "the network returns probabilities",
            found=f"{where}: no output is negative, and they sum to 1",
            fix="return the logits: leave the softmax at the end of forward() away; labels stay the same",
        )


def _ends_in_sigmoid(model: TorchModel, shape: tuple[int, ...]) -> bool:
    """As far as can be told: a network that does not bear gradients may yet be exported."""
    try:
        with torch.enable_grad():
            output: Tensor = model.module(torch.full((2, *shape), 0.5))
    except Exception:  # of user code, which has just run without gradients
        return False
    return output.grad_fn is not None and output.grad_fn.name().startswith("SigmoidBackward")
