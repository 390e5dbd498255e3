"""The other runtimes for which a file is written beside the integer graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from toolkit.config import QuantizeConfig
from toolkit.errors import unknown_name

TargetName = Literal["tensorrt", "cuda"]


@dataclass(frozen=True, slots=True)
class TargetKind:
    """A form of the network that one runtime wants."""

    name: TargetName
    suffix: str
    """Of the file: `model.<suffix>.onnx`."""
    precision: str


TARGETS: Mapping[str, TargetKind] = {
    "tensorrt": TargetKind("tensorrt", "trt", "int8 symmetric weights and activations, all zero points 0"),
    "cuda": TargetKind("cuda", "fp16", "float16 of the float twin"),
}


def chosen_targets(config: QuantizeConfig) -> tuple[TargetKind, ...]:
    """The targets that a configuration names, each once.

    Raises:
        ToolkitError: one that does not exist.
    """
    for name in config.targets:
        if name not in TARGETS:
            raise unknown_name("target (--target)", name, TARGETS)
    return tuple(TARGETS[name] for name in dict.fromkeys(config.targets))


def target_file(name: str, kind: TargetKind) -> str:
    """The name of a target's file beside a file `name`: model.onnx, model.trt.onnx."""
    return f"{name.removesuffix('.onnx')}.{kind.suffix}.onnx"
