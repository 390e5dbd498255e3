"""Our self-describing checkpoint: loads with weights_only=True, and says how to rebuild its network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit import paths
from toolkit.artifacts import HashArray, ModelSpec, Normalization, TorchModel
from toolkit.errors import ToolkitError

FORMAT = "onnx-hardening-toolkit/1"


def save_checkpoint(model: TorchModel, path: Path, home: Path | None = None) -> None:
    """Write `model` to `path`: spec as plain data, weights, and the hashes of its training images.

    Paths in the spec (of an image folder, of the network's code) are kept relative to the file.

    Args:
        model: what to save.
        path: the file.
        home: the folder in which the file will stand in the end; None: where it is written.
    """
    folder = (home or path.parent).absolute()
    state = {key: value.detach().cpu().contiguous() for key, value in model.network.state_dict().items()}
    hashes = torch.from_numpy(model.training_hashes.view(np.int64).copy())
    torch.save(
        {
            "format": FORMAT,
            "spec": _map_places(spec_to_dict(model.spec), lambda setting: paths.relative(setting, folder)),
            "state_dict": state,
            "hashes": hashes,
        },
        path,
    )


def is_checkpoint(content: object) -> bool:
    """Whether unpickled file content is a checkpoint of ours, of any version."""
    return isinstance(content, dict) and str(content.get("format", "")).startswith("onnx-hardening-toolkit/")


def parse_checkpoint(content: Mapping[str, Any], path: Path) -> tuple[ModelSpec, dict[str, Tensor], HashArray]:
    """Spec, weights and training hashes of a checkpoint's content.

    Raises:
        ToolkitError: written by another version, or damaged.
    """
    if content["format"] != FORMAT:
        raise ToolkitError(
            "the checkpoint is of another version",
            found=f"{path}: {content['format']}",
            fix=f"use the toolkit that wrote it, or one that reads {FORMAT}",
        )
    try:
        hashes = content["hashes"].numpy().view(np.uint64)
        spec = _map_places(content["spec"], lambda setting: paths.resolved(setting, path.absolute().parent))
        state = dict(content["state_dict"])
        strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if strange:
            raise TypeError(f"{strange[0]} is no tensor")
        return spec_from_dict(spec), state, hashes
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ToolkitError(
            "the checkpoint is damaged", found=f"{path}: {type(error).__name__} {error}", fix="use another copy of it"
        ) from error


def _map_places(spec: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    places = {name: change(spec[name]) for name in ("architecture", "dataset") if spec[name] is not None}
    return {**spec, **places}


def spec_to_dict(spec: ModelSpec) -> dict[str, Any]:
    """`spec` as plain JSON data; `spec_from_dict` is the inverse."""
    return asdict(spec)


def spec_from_dict(values: Mapping[str, Any]) -> ModelSpec:
    """The inverse of `spec_to_dict`."""
    channels, height, width = (int(side) for side in values["input_shape"])
    normalization = values["normalization"]
    return ModelSpec(
        architecture=str(values["architecture"]),
        class_names=tuple(values["class_names"]),
        input_shape=(channels, height, width),
        normalization=Normalization(tuple(normalization["mean"]), tuple(normalization["std"])),
        dataset=values["dataset"],
        pruning=tuple(values["pruning"]),
        training=tuple(values["training"]),
    )
