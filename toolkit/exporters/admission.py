"""What cannot be quantised: refused before any work is done."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from onnx import ModelProto, numpy_helper

from toolkit.artifacts import Split
from toolkit.config import QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.calibration import AdversarialShare
from toolkit.exporters.precision import COMPUTE

ACTIVATION_BITS, WEIGHT_BITS = (8, 16), (4, 8)
COARSE_METHODS = ("entropy", "mse")
"""Calibration methods that clip values away so that 256 levels serve the rest."""


def refuse_bits(config: QuantizeConfig) -> None:
    """Only precisions that ONNX Runtime runs are written; the others can be simulated."""
    sides = (
        ("--activation-bits", config.activation_bits, ACTIVATION_BITS),
        ("--weight-bits", config.weight_bits, WEIGHT_BITS),
    )
    for flag, bits, possible in sides:
        if bits not in possible:
            other = "activations" if flag == "--weight-bits" else "weights"
            pair = f"{bits}/8" if other == "activations" else f"8/{bits}"
            raise ToolkitError(
                f"{flag} names a precision that ONNX Runtime has no graph for",
                found=f"{bits} bits",
                fix=f"choose {' or '.join(map(str, possible))}; other precisions can be simulated, in torch: "
                f"`toolkit simulate MODEL --bits {pair}`",
            )
    if config.activation_bits == 16 and config.reduce_range:
        raise ToolkitError(
            "--reduce-range saves sums of integers from overflowing",
            found="--activation-bits 16, with which ONNX Runtime computes in float",
            fix="leave one of the two flags away",
        )
    if config.activation_bits == 16 and config.calibrate in COARSE_METHODS:
        raise ToolkitError(
            f"--calibrate {config.calibrate} looks for the range that suits 256 levels",
            found="--activation-bits 16, which has 65,536",
            fix="use --calibrate minmax, moving-average or percentile",
        )


def refuse_missing_attack(config: QuantizeConfig, adversarial: AdversarialShare | None, path: Path) -> None:
    """Adversarial images need an attack that makes them."""
    if config.calibrate_adversarial > 0 and adversarial is None:
        raise ToolkitError(
            "--calibrate-adversarial needs the torch network, which the attacked images are made on",
            found=f"an ONNX file alone: {path}",
            fix="run `toolkit harden MODEL --int8 --calibrate-adversarial SHARE` (with --prune 0 --finetune none to "
            "leave the network as it is), or leave the flag away",
        )


def refuse_quantised(model: ModelProto, path: Path) -> None:
    """A graph is quantised once."""
    counts = Counter(
        node.op_type for node in model.graph.node
        if node.op_type in {"QuantizeLinear", "DequantizeLinear", "QGemm"}
        or node.op_type.startswith(("QLinear", "DynamicQuantize"))
        or "Integer" in node.op_type
    )  # fmt: skip
    if counts:
        raise ToolkitError(
            "the graph is quantised already",
            found=f"{path}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())),
            fix="give the float graph: model.fp32.onnx of a bundle, or `toolkit export` of the network",
        )


def refuse_optimised(model: ModelProto, path: Path) -> None:
    """Blocked layouts, which ONNX Runtime writes for one kind of processor, cannot be quantised any more."""
    blocked = Counter(node.op_type for node in model.graph.node if node.domain == "com.microsoft.nchwc")
    if blocked:
        raise ToolkitError(
            "the graph was optimised for one kind of processor already",
            found=f"{path}: nodes in blocked layouts: "
            + ", ".join(f"{count} {name}" for name, count in sorted(blocked.items())),
            fix="give the graph as it was exported; ONNX Runtime optimises it when it is loaded",
        )


def fixed_batch(model: ModelProto, path: Path, calibration: Split) -> int | None:
    """The batch size that the graph insists on, if it does; refuses images that do not fit the graph."""
    sizes = [axis.dim_value or None for axis in model.graph.input[0].type.tensor_type.shape.dim]
    shape = calibration.images.shape
    if len(sizes) != 4 or any(size not in (None, given) for size, given in zip(sizes[1:], shape, strict=True)):
        raise ToolkitError(
            "the calibration images do not fit the graph",
            found=f"images {list(shape)}; {path} takes {[size or 'any' for size in sizes]}",
            fix="name data of the right size and channels (--data, --size)",
        )
    return sizes[0]


def refuse_bad_weights(model: ModelProto, path: Path) -> None:
    """Weights must be numbers."""
    owners = {name: node.name for node in model.graph.node for name in node.input}
    for item in model.graph.initializer:
        values = numpy_helper.to_array(item)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = int(values.size - np.isfinite(values).sum())
            raise ToolkitError(
                "a layer has weights that are no numbers",
                found=f"{path}: {bad} of {values.size} values of '{item.name}' (layer '{owners.get(item.name, '?')}') "
                "are NaN or infinite",
                fix="the training diverged: train again with a lower --learning-rate, or take an earlier checkpoint",
            )


def zero_filters(model: ModelProto) -> dict[str, int]:
    """By layer: output channels whose weights are all 0; those without any are left out."""
    constants = {item.name: item for item in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type in COMPUTE and node.input[1] in constants:
            weights = numpy_helper.to_array(constants[node.input[1]])
            turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            axis = 0 if node.op_type == "Conv" or turned else weights.ndim - 1
            others = tuple(other for other in range(weights.ndim) if other != axis)
            count = int((~weights.any(axis=others)).sum())
            if count:
                found[node.name] = count
    return found
