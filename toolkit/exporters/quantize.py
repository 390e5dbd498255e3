"""Static integer quantisation with onnxruntime: int8 symmetric per-channel weights, uint8 asymmetric activations."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping
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
from toolkit.exporters.admission import fixed_batch, refuse_bad_weights, refuse_missing_attack, refuse_quantised
from toolkit.exporters.affine import norms_to_convolutions
from toolkit.exporters.calibration import AdversarialShare, CalibrationReader, calibration_batch
from toolkit.exporters.engine import QuantizedModel, float_layers, save_integer_graph
from toolkit.exporters.input_folding import fold_normalization, move_quantiser_to_pixels, read_shape_from_image
from toolkit.exporters.input_range import InputGrid, covering_grid, pixel_map
from toolkit.exporters.observer import activation_bytes, observe
from toolkit.exporters.onnx import load_onnx
from toolkit.exporters.precision import COMPUTE, between_float
from toolkit.exporters.qdq import finish, keep_islands_float, keep_logits_float
from toolkit.exporters.ranges import METHODS, Interval, choose_range, needs_histogram
from toolkit.exporters.rewrites import rewrite
from toolkit.exporters.session import hide_log

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

    @property
    def methods(self) -> tuple[CalibrationName, ...]:
        """The calibration methods that `with_calibration` takes."""
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
        return save_integer_graph(
            self._build(kept),
            output,
            engine="onnxruntime",
            calibration=self._method,
            reader=self._reader,
            per_channel=self._config.per_channel,
            kept=kept,
        )

    def _chosen_ranges(self) -> dict[str, Interval]:
        method = self._method
        assert method is not None
        if method not in self._ranges:
            self._ranges[method] = {
                name: choose_range(observed, method, self._config.percentile)
                for name, observed in self._observed.items()
            }
        return self._ranges[method]

    def _build(self, kept: Collection[str]) -> ModelProto:
        config, prepared = self._config, ModelProto()
        prepared.CopyFrom(self._plain)
        mapping = pixel_map(prepared)
        readers = {node.name for node in prepared.graph.node if mapping.tensor in node.input}
        folded = None if readers & set(kept) else fold_normalization(prepared, mapping, self._margin)
        grid = covering_grid(float(mapping.of(-self._margin).min()), float(mapping.of(1 + self._margin).max()))
        if folded is not None:
            grid = InputGrid(np.ones(1), folded.quantiser.zero_point + folded.mean_steps)
        left_float = {*kept, *between_float(prepared, kept), *(node.name for node in pixel_map(prepared).nodes)}
        left_float |= set(_left_float(prepared))
        if config.per_channel:  # one scale for all channels would round factors of very different size
            norms_to_convolutions(prepared, keep=left_float)
        quantised = _run_onnxruntime(
            prepared, self._chosen_ranges(), _options(mapping.tensor, grid), config, left_float
        )
        if folded is not None:
            move_quantiser_to_pixels(quantised, mapping, folded.quantiser)
        keep_logits_float(quantised)
        keep_islands_float(quantised, kept)
        finish(quantised, self._source)
        return quantised


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
        if node.op_type in (*QUANTISED_OPERATORS, "BatchNormalization")
        for name in (*node.input, *node.output)
        if kinds.get(name) == TensorProto.FLOAT and name not in constants
    )
    return tuple(found)


def _run_onnxruntime(
    prepared: ModelProto,
    ranges: Mapping[str, Interval],
    options: dict[str, Any],
    config: QuantizeConfig,
    left_float: Collection[str],
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
            op_types_to_quantize=QUANTISED_OPERATORS,
            nodes_to_exclude=[*left_float],
            per_channel=config.per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibration_cache_path=cache,
            extra_options=options,
        )
        return onnx.load(after)


def _options(tensor: str, grid: InputGrid) -> dict[str, Any]:
    step, zero_point = np.array(grid.step[0], dtype=np.float32), np.array(grid.zero_point, dtype=np.uint8)
    return {
        "ActivationSymmetric": False,
        "WeightSymmetric": True,
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
