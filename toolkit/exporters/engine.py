"""What the engines of static quantisation share: the integer graph that they write, and how it is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from onnx import ModelProto

from toolkit.artifacts import OnnxModel
from toolkit.config import CalibrationName, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.calibration import CalibrationReader
from toolkit.exporters.input_range import input_range
from toolkit.exporters.onnx import save_onnx
from toolkit.exporters.precision import COMPUTE, LayerPrecision, layer_precision, named_layers, precision_faults
from toolkit.exporters.variants import Variant

EngineName = Literal["onnxruntime", "neural-compressor"]


@dataclass(frozen=True)
class QuantizedModel:
    """An integer graph and how it was made."""

    model: OnnxModel
    layers: tuple[LayerPrecision, ...]
    calibration: CalibrationName
    calibration_images: int
    per_channel: bool
    input_range: tuple[float, float] | None
    """The pixels that the input quantiser represents; None: the first layer is float."""
    adversarial_images: int = 0
    """Of the calibration images, those that came attacked."""
    engine: EngineName = "onnxruntime"
    learnt_ranges: int = 0
    """Tensors whose ranges a training learnt; calibration set those of the others."""
    equalized: int = 0
    """Pairs of layers between which channels were scaled; see `exporters.equalization`."""
    activation_bits: int = 8
    constant_channels: Mapping[str, int] = field(default_factory=dict)
    """By layer: channels of what it reads that are constant on the calibration images."""

    def weights(self, bits: int) -> str:
        """The weights' precision in words; int8 ones use `bits` bits."""
        granularity = "per channel" if self.per_channel else "per tensor"
        eight = f"int8 symmetric {granularity}"
        found = {layer.precision for layer in self.layers} - {"float32"}
        if found == {"int4"}:
            return "int4 symmetric per channel"
        words = f"{eight}; of linear layers int4 symmetric per channel" if "int4" in found else eight
        return f"{words}, int8 ones of {bits} bits" if bits < 8 else words


class Writer(Protocol):
    """Writes integer graphs of one network, any of its layers left float."""

    @property
    def methods(self) -> tuple[CalibrationName, ...]:
        """The calibration methods that `with_calibration` takes."""

    @property
    def kept(self) -> tuple[str, ...]:
        """The layers that the configuration leaves float."""

    @property
    def rounded(self) -> ModelProto:
        """The float graph whose weights and activations are rounded; of the float twin's function."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers, in the order of the float twin."""

    def with_calibration(self, method: CalibrationName) -> Writer:
        """One that calibrates by another method."""

    def write(self, output: Path, *, keep_float: Collection[str] = ()) -> QuantizedModel:
        """Write the integer graph, with further layers left float."""

    def write_variant(self, output: Path, variant: Variant, *, keep_float: Collection[str] = ()) -> None:
        """Write it as other machines or runtimes want it, to be compared."""


def float_layers(model: ModelProto, config: QuantizeConfig, path: Path) -> tuple[str, ...]:
    """The layers that a configuration leaves float, in the order of the graph.

    Raises:
        ToolkitError: a pattern fits no layer, or none would be left to quantise.
    """
    kept = {
        *named_layers(model, config.keep_float),
        *named_layers(model, config.keep_float_here, "keep_float_here, which config.yaml has from another network"),
    }
    layers = named_layers(model, ["*"]) if kept else ()
    if len(kept) == sum(node.op_type in COMPUTE for node in model.graph.node):
        raise ToolkitError(
            "no layer is left to quantise",
            found=f"{path}: --keep-float (in config.yaml with keep_float_here) names all of {len(kept)} layers, or "
            "there is none",
            fix="name fewer layers, or ship the float graph (`toolkit harden --allow-float` without --int8)",
        )
    return tuple(name for name in layers if name in kept)


def save_integer_graph(
    quantised: ModelProto,
    output: Path,
    *,
    engine: EngineName,
    calibration: CalibrationName,
    reader: CalibrationReader,
    per_channel: bool,
    kept: Collection[str],
    four_bit: Collection[str] = (),
    activation_bits: int = 8,
) -> QuantizedModel:
    """Write a finished graph in QDQ form, once it is seen to be what was asked for.

    Args:
        quantised: the graph.
        output: the file.
        engine: which made it; calibration: by which method; reader: of which images.
        per_channel: the granularity of weight scales that was asked for.
        kept: the layers that must be float; all others must have integer weights.
        four_bit: the layers whose weights must be int4.
        activation_bits: 8 or 16.
    """
    faults = precision_faults(
        quantised,
        per_channel=per_channel,
        kept=kept,
        four_bit=four_bit,
        activations="uint8" if activation_bits == 8 else "uint16",
    )
    if faults:
        raise RuntimeError(f"{engine} made another graph than was asked for: {'; '.join(faults)}")
    save_onnx(quantised, output)
    return QuantizedModel(
        OnnxModel(output, "deployed"),
        layer_precision(quantised),
        calibration,
        reader.images,
        per_channel,
        input_range(output),
        reader.adversarial_images,
        engine,
        activation_bits=activation_bits,
    )
