"""Static integer quantisation with onnxruntime: int8 symmetric per-channel weights, uint8 asymmetric activations.

Where asked for, activations are uint16 (no integer kernel of ONNX Runtime reads them), linear layers' weights int4.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.quantize import save_tensors_data
from onnxruntime.quantization.shape_inference import quant_pre_process

from toolkit import progress
from toolkit.artifacts import OnnxModel, Split
from toolkit.config import CalibrationName, QuantizeConfig
from toolkit.exporters.admission import (
    COARSE_METHODS,
    fixed_batch,
    refuse_bad_weights,
    refuse_bits,
    refuse_missing_attack,
    refuse_quantised,
    zero_filters,
)
from toolkit.exporters.calibration import AdversarialShare, CalibrationReader, calibration_batch
from toolkit.exporters.engine import QuantizedModel, float_layers, save_integer_graph
from toolkit.exporters.four_bits import four_bit_layers, pack_four_bits
from toolkit.exporters.input_folding import fold_normalization, move_quantiser_to_pixels, read_shape_from_image
from toolkit.exporters.input_range import LEVELS, InputGrid, covering_grid, pixel_map, symmetric_grid
from toolkit.exporters.observer import activation_bytes, observe
from toolkit.exporters.onnx import load_onnx, save_onnx
from toolkit.exporters.precision import COMPUTE, between_float
from toolkit.exporters.qdq import finish, keep_islands_float, keep_logits_float
from toolkit.exporters.ranges import METHODS, Interval, choose_range, needs_histogram
from toolkit.exporters.rewrites import rewrite
from toolkit.exporters.session import hide_log
from toolkit.exporters.tensorrt import symmetric_options, tensorrt_faults
from toolkit.exporters.variants import DEPLOYED, Variant
from toolkit.exporters.zero_filters import refine_biases

QUANTISED_OPERATORS = [
    *COMPUTE, "Add", "Mul", "Relu", "LeakyRelu", "Clip", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool",
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Pad", "Split",
]  # fmt: skip
"""Operators with integer kernels in ONNX Runtime; LayerNormalization, Softmax and Gelu have none."""


def quantize_int8(
    model: OnnxModel,
    output: Path,
    calibration: Split,
    config: QuantizeConfig,
    *,
    input_margin: tuple[float, ...] | float = 0.0,
    adversarial: AdversarialShare | None = None,
) -> QuantizedModel:
    """Quantise a float graph in QDQ form, so that ONNX Runtime runs its layers in integers: `Quantizer`, used once."""
    return Quantizer(model, calibration, config, input_margin=input_margin, adversarial=adversarial).write(output)


LEVELS_WIDE = 65535
"""Of uint16, as `LEVELS` of uint8."""


class Quantizer:
    """A float graph with what its activations are like; writes integer graphs, any of its layers left float.

    The logits stay float: a last layer of integers has no output quantiser, which would make ties. What lies between
    two float layers stays float too.

    Args:
        model: a float ONNX classifier.
        calibration: images that set the activations' ranges, streamed.
        config: the calibration method, and which layers stay float.
        input_margin: pixels by which images may leave [0, 1]; the input quantiser represents them unclipped. Of several
            (one per channel) the largest counts.
        adversarial: the attack for `config.calibrate_adversarial`; needed where that is above 0.

    Raises:
        ToolkitError: the graph is quantised already, has weights that are no numbers, there are no images, or
            adversarial images are asked for with no attack to make them.
    """

    def __init__(
        self,
        model: OnnxModel,
        calibration: Split,
        config: QuantizeConfig,
        *,
        input_margin: tuple[float, ...] | float = 0.0,
        adversarial: AdversarialShare | None = None,
    ) -> None:
        self._config, self._path = config, model.path
        refuse_bits(config)
        refuse_missing_attack(config, adversarial, model.path)
        self._source = load_onnx(model.path)
        refuse_quantised(self._source, model.path)
        refuse_bad_weights(self._source, model.path)
        fixed = fixed_batch(self._source, model.path, calibration)
        self._margin = float(np.max(np.atleast_1d(input_margin)))
        rewritten = rewrite(self._source)
        read_shape_from_image(rewritten, pixel_map(rewritten))
        self._plain = _preprocess(rewritten)
        self._kept = float_layers(self._plain, config.keep_float, model.path)
        self._four_bit = four_bit_layers(self._plain) if config.weight_bits == 4 else ()
        tensors = _tensors(self._plain)
        self._reader = CalibrationReader(
            calibration,
            self._plain.graph.input[0].name,
            margin=self._margin,
            batch_size=fixed or calibration_batch(activation_bytes(self._plain, tensors)),
            whole_batches=fixed is not None,
            adversarial=adversarial,
        )
        self._method: CalibrationName | None = None if config.calibrate == "auto" else config.calibrate
        self._ranges: dict[CalibrationName, dict[str, Interval]] = {}
        histograms = self._method is None or needs_histogram(self._method)
        with progress.task("calibrate", len(self._reader) * (2 if histograms else 1)) as task:
            self._reader.report_to(task)
            self._observed = observe(self._plain, tensors, self._reader, histograms=histograms)
        self._constant = {
            node.name: self._observed[node.input[0]].constant_channels
            for node in self._plain.graph.node
            if node.op_type in COMPUTE and node.input[0] in self._observed
        }
        _notice_constant(self._constant, zero_filters(self._plain))

    @property
    def methods(self) -> tuple[CalibrationName, ...]:
        """The calibration methods that `with_calibration` takes."""
        if self._config.activation_bits == 16:
            return tuple(method for method in METHODS if method not in COARSE_METHODS)
        return METHODS

    @property
    def kept(self) -> tuple[str, ...]:
        """The layers that the configuration leaves float."""
        return self._kept

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers, in the order of the graph."""
        return tuple(node.name for node in self._plain.graph.node if node.op_type in COMPUTE)

    def with_calibration(self, method: CalibrationName) -> Quantizer:
        """One that writes graphs with another method; of a configuration with `auto`, which holds for all of them."""
        if self._config.calibrate not in ("auto", method):
            raise ValueError(f"statistics were gathered for {self._config.calibrate} alone")
        other = copy.copy(self)
        other._method = method
        return other

    def write(self, output: Path, *, keep_float: Collection[str] = ()) -> QuantizedModel:
        """Write the integer graph, with further layers left float.

        Raises:
            ValueError: the configuration leaves the calibration method open; see `with_calibration`.
        """
        if self._method is None:
            raise ValueError("no calibration method is chosen")
        kept = {*self._kept, *keep_float}
        written = save_integer_graph(
            self._build(kept),
            output,
            engine="onnxruntime",
            calibration=self._method,
            reader=self._reader,
            per_channel=self._config.per_channel,
            kept=kept,
            four_bit={*self._four_bit} - kept,
            activation_bits=self._config.activation_bits,
        )
        return replace(written, constant_channels={name: count for name, count in self._constant.items() if count})

    def write_variant(self, output: Path, variant: Variant, *, keep_float: Collection[str] = ()) -> None:
        """Write the integer graph as other machines or runtimes want it, to be compared; see `write`."""
        save_onnx(self._build({*self._kept, *keep_float}, variant), output)

    def write_tensorrt(self, output: Path) -> None:
        """Write the symmetric S8S8 graph that TensorRT wants, of the same ranges; see `exporters.tensorrt`.

        The layers that the configuration leaves float stay so.
        """
        prepared = ModelProto()
        prepared.CopyFrom(self._plain)
        mapping = pixel_map(prepared)
        made = _run_onnxruntime(
            prepared,
            self._chosen_ranges(),
            symmetric_options(mapping, self._margin),
            self._kept,
            per_channel=self._config.per_channel,
            activations=QuantType.QInt8,
            operators=COMPUTE,
        )
        finish(made, self._source)
        faults = tensorrt_faults(made, kept=self._kept)
        if faults:
            raise RuntimeError(f"the graph for TensorRT is another than was asked for: {'; '.join(faults)}")
        save_onnx(made, output)

    def _chosen_ranges(self) -> dict[str, Interval]:
        method = self._method
        assert method is not None
        if method not in self._ranges:
            self._ranges[method] = {
                name: choose_range(observed, method, self._config.percentile)
                for name, observed in self._observed.items()
            }
        return self._ranges[method]

    def _build(self, kept: Collection[str], variant: Variant = DEPLOYED) -> ModelProto:
        four = {*self._four_bit} - {*kept}
        built = self._eight_bits({*kept, *four}, kept, variant)
        return pack_four_bits(built, four) if four else built

    def _eight_bits(self, kept: Collection[str], islands: Collection[str], variant: Variant) -> ModelProto:
        """The graph in QDQ form but for the layers `kept`, of which ONNX Runtime is to leave `islands` float."""
        config, prepared = self._config, ModelProto()
        prepared.CopyFrom(self._plain)
        mapping = pixel_map(prepared)
        readers = {node.name for node in prepared.graph.node if mapping.tensor in node.input}
        wide = config.activation_bits == 16 and not variant.signed
        unfolded = wide or variant.signed or bool(readers & set(kept))  # wide: in float, where folding gains nothing
        folded = None if unfolded else fold_normalization(prepared, mapping, self._margin)
        ends = float(mapping.of(-self._margin).min()), float(mapping.of(1 + self._margin).max())
        grid = symmetric_grid(*ends) if variant.signed else covering_grid(*ends, LEVELS_WIDE if wide else LEVELS)
        if folded is not None:
            grid = InputGrid(np.ones(1), folded.quantiser.zero_point + folded.mean_steps)
        left_float = {*kept, *between_float(prepared, kept), *(node.name for node in pixel_map(prepared).nodes)}
        kind = QuantType.QInt8 if variant.signed else QuantType.QUInt16 if wide else QuantType.QUInt8
        quantised = _run_onnxruntime(
            prepared,
            self._chosen_ranges(),
            _options(mapping.tensor, grid, kind, variant),
            left_float,
            per_channel=config.per_channel,
            activations=kind,
            reduce_range=config.reduce_range or variant.reduce_range,
        )
        refine_biases(quantised, prepared)
        if folded is not None:
            move_quantiser_to_pixels(quantised, mapping, folded.quantiser)
        keep_logits_float(quantised)
        keep_islands_float(quantised, islands)
        finish(quantised, self._source)
        return quantised


def _notice_constant(activations: Mapping[str, int], filters: Mapping[str, int]) -> None:
    """Say what is quantised and carries nothing."""
    for what, counts in (("constant on the calibration images", activations), ("filters of zeros", filters)):
        named = {name: count for name, count in counts.items() if count}
        if named:
            where = ", ".join(f"{count} at '{name}'" for name, count in named.items())
            progress.notice(f"channels that carry nothing ({what}): {sum(named.values())} ({where})")


def _preprocess(model: ModelProto) -> ModelProto:
    """The graph with inferred shapes, and what can be folded before quantisation folded."""
    hide_log()
    with tempfile.TemporaryDirectory(prefix="toolkit-quantize-") as folder, _silence():
        path = Path(folder, "float.onnx")
        quant_pre_process(model, str(path))
        return onnx.load(path)


def _tensors(model: ModelProto) -> tuple[str, ...]:
    """The float tensors, constants left out, that operators with integer kernels read or make."""
    graph = model.graph
    constants = {item.name for item in graph.initializer}
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output, *graph.input)}
    found = dict.fromkeys(
        name
        for node in graph.node
        if node.op_type in QUANTISED_OPERATORS
        for name in (*node.input, *node.output)
        if kinds.get(name) == TensorProto.FLOAT and name not in constants
    )
    return tuple(found)


def _run_onnxruntime(
    prepared: ModelProto,
    ranges: Mapping[str, Interval],
    options: dict[str, Any],
    left_float: Collection[str],
    *,
    per_channel: bool,
    activations: QuantType,
    reduce_range: bool = False,
    operators: Sequence[str] = QUANTISED_OPERATORS,
) -> ModelProto:
    known = {name: tuple(np.float32(end) for end in ends) for name, ends in ranges.items()}
    with tempfile.TemporaryDirectory(prefix="toolkit-quantize-") as folder, _silence():
        before, after, cache = (Path(folder, name) for name in ("float.onnx", "int8.onnx", "ranges.json"))
        onnx.save(prepared, before)
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, known), cache)
        quantize_static(
            before,
            after,
            None,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(operators),
            nodes_to_exclude=[*_left_float(prepared), *left_float],
            per_channel=per_channel,
            reduce_range=reduce_range,
            activation_type=activations,
            weight_type=QuantType.QInt8,
            calibration_cache_path=cache,
            extra_options=options,
        )
        return onnx.load(after)


KINDS = {QuantType.QInt8: np.int8, QuantType.QUInt8: np.uint8, QuantType.QUInt16: np.uint16}


def _options(tensor: str, grid: InputGrid, activations: QuantType, variant: Variant) -> dict[str, Any]:
    step = np.array(grid.step[0], dtype=np.float32)
    zero_point = np.array(grid.zero_point, dtype=KINDS[activations])
    if step < grid.step[0]:  # float32 must not round the ends of the range inwards
        step = np.array(np.nextafter(step, np.float32(np.inf)))
    return {
        "ActivationSymmetric": variant.signed,
        "WeightSymmetric": True,
        # Of 16-bit sums an int32 bias may overflow, and onnxruntime would make weights coarser to prevent it.
        "QuantizeBias": activations != QuantType.QUInt16 and not variant.float_bias,
        "TensorQuantOverrides": {tensor: [{"scale": step, "zero_point": zero_point}]},
    }


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The quantiser prints and logs every batch."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def _left_float(model: ModelProto) -> list[str]:
    return [*_tail(model), *_residual_stream(model)]


def _residual_stream(model: ModelProto) -> list[str]:
    """Names of the additions that a LayerNormalization reads.

    They hold no multiply-accumulates, and the normalisation scales the error of eight bits up: on a vision transformer
    label agreement with the float network was 80 % with them quantised and 95 % without.
    """
    normalised = {node.input[0] for node in model.graph.node if node.op_type == "LayerNormalization"}
    return [node.name for node in model.graph.node if node.op_type == "Add" and node.output[0] in normalised]


def _tail(model: ModelProto) -> list[str]:
    """Names of the nodes behind the last layer (pooling, reshaping): quantising them would only coarsen the logits.

    A Relu or Clip right behind a layer stays: it fuses into the layer.
    """
    reaches: set[str] = set()
    tail = []
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in reversed(model.graph.node):
        if node.op_type in COMPUTE or any(name in reaches for name in node.output):
            reaches.update(node.input)
            continue
        source = producers.get(node.input[0]) if node.input else None
        fuses = node.op_type in {"Relu", "Clip"} and source is not None and source.op_type in COMPUTE
        if not fuses:
            tail.append(node.name)
    return tail
