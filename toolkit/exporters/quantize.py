"""Static integer quantisation with onnxruntime: int8 symmetric per-channel weights, uint8 asymmetric activations."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.quantize import save_tensors_data
from onnxruntime.quantization.shape_inference import quant_pre_process

from toolkit import progress
from toolkit.artifacts import OnnxModel, Split
from toolkit.config import CalibrationName, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.calibration import AdversarialShare, CalibrationReader, calibration_batch
from toolkit.exporters.input_folding import fold_normalization, move_quantiser_to_pixels, read_shape_from_image
from toolkit.exporters.input_range import InputGrid, covering_grid, input_range, pixel_map
from toolkit.exporters.observer import activation_bytes, observe
from toolkit.exporters.onnx import load_onnx, save_onnx
from toolkit.exporters.precision import (
    COMPUTE,
    LayerPrecision,
    between_float,
    layer_precision,
    named_layers,
    precision_faults,
)
from toolkit.exporters.ranges import Interval, choose_range, needs_histogram
from toolkit.exporters.rewrites import remove_unused_initializers, rewrite, strip_metadata
from toolkit.exporters.session import hide_log

QUANTISED_OPERATORS = [
    *COMPUTE, "Add", "Mul", "Relu", "LeakyRelu", "Clip", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool",
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Pad", "Split",
]  # fmt: skip
"""Operators with integer kernels in ONNX Runtime; LayerNormalization, Softmax and Gelu have none."""


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
        _refuse_missing_attack(config, adversarial, model.path)
        self._source = load_onnx(model.path)
        _refuse_quantised(self._source, model.path)
        _refuse_bad_weights(self._source, model.path)
        fixed = _fixed_batch(self._source, model.path, calibration)
        self._margin = float(np.max(np.atleast_1d(input_margin)))
        rewritten = rewrite(self._source)
        read_shape_from_image(rewritten, pixel_map(rewritten))
        self._plain = _preprocess(rewritten)
        self._kept = named_layers(self._plain, config.keep_float)
        if len(self._kept) == len(self.layers):
            raise ToolkitError(
                "no layer is left to quantise",
                found=f"{model.path}: --keep-float names all of {len(self._kept)} layers, or there is none",
                fix="name fewer layers, or ship the float graph (`toolkit harden --allow-float` without --int8)",
            )
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
        config = self._config
        if self._method is None:
            raise ValueError("no calibration method is chosen")
        kept = {*self._kept, *keep_float}
        quantised = self._build(kept)
        faults = precision_faults(quantised, per_channel=config.per_channel, kept=kept)
        if faults:
            raise RuntimeError(f"onnxruntime made another graph than was asked for: {'; '.join(faults)}")
        save_onnx(quantised, output)
        return QuantizedModel(
            OnnxModel(output, "deployed"),
            layer_precision(quantised),
            self._method,
            self._reader.images,
            config.per_channel,
            input_range(output),
            self._reader.adversarial_images,
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
        quantised = _run_onnxruntime(
            prepared, self._chosen_ranges(), _options(mapping.tensor, grid), config, left_float
        )
        if folded is not None:
            move_quantiser_to_pixels(quantised, mapping, folded.quantiser)
        _keep_logits_float(quantised)
        _keep_islands_float(quantised, kept)
        _finish(quantised, self._source)
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
        if node.op_type in QUANTISED_OPERATORS
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
            nodes_to_exclude=[*_left_float(prepared), *left_float],
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


def _refuse_missing_attack(config: QuantizeConfig, adversarial: AdversarialShare | None, path: Path) -> None:
    if config.calibrate_adversarial > 0 and adversarial is None:
        raise ToolkitError(
            "--calibrate-adversarial needs the torch network, which the attacked images are made on",
            found=f"an ONNX file alone: {path}",
            fix="run `toolkit harden MODEL --int8 --calibrate-adversarial SHARE` (with --prune 0 --finetune none to "
            "leave the network as it is), or leave the flag away",
        )


def _refuse_quantised(model: ModelProto, path: Path) -> None:
    counts = Counter(
        node.op_type for node in model.graph.node
        if node.op_type in {"QuantizeLinear", "DequantizeLinear", "QGemm"}
        or node.op_type.startswith("QLinear")
        or node.op_type.endswith("Integer")
    )  # fmt: skip
    if counts:
        raise ToolkitError(
            "the graph is quantised already",
            found=f"{path}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items())),
            fix="give the float graph: model.fp32.onnx of a bundle, or `toolkit export` of the network",
        )


def _fixed_batch(model: ModelProto, path: Path, calibration: Split) -> int | None:
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


def _refuse_bad_weights(model: ModelProto, path: Path) -> None:
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


def _keep_logits_float(model: ModelProto) -> None:
    """Take the output quantiser off every Gemm and MatMul that no other layer follows, in place."""
    reaches: set[str] = set()
    last: set[str] = set()
    for node in reversed(model.graph.node):
        if node.op_type in COMPUTE or any(name in reaches for name in node.output):
            if node.op_type in {"Gemm", "MatMul"} and node.output[0] not in reaches:
                last.add(node.output[0])
            reaches.update(node.input)
    quantisers = {node.output[0]: node for node in model.graph.node if node.op_type == "QuantizeLinear"}
    removed = set()
    for node in list(model.graph.node):
        quantiser = quantisers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if quantiser is not None and quantiser.input[0] in last:
            removed |= {node.output[0], quantiser.output[0]}
            _rename(model, quantiser.input[0], node.output[0])
    kept = [node for node in model.graph.node if not (node.output[0] in removed and node.op_type.endswith("Linear"))]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _keep_islands_float(model: ModelProto, kept: Collection[str]) -> None:
    """Put an identity that is not recognised as one behind float layers between two quantisers, in place.

    ONNX Runtime quantises the weights of such a layer itself, with one scale for all (its WeightBiasQuantization, found
    in 1.31). A LeakyRelu of slope 1 behind the layer keeps it from that, and is fused into the layer's float kernel.
    """
    dequantised = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for index in range(len(model.graph.node) - 1, -1, -1):
        node = model.graph.node[index]
        if node.name in kept and node.input[0] in dequantised:
            result = node.output[0]
            node.output[0] = f"{result}_float"
            same = helper.make_node("LeakyRelu", [node.output[0]], [result], name=f"{node.name}_float", alpha=1.0)
            model.graph.node.insert(index + 1, same)


def _rename(model: ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == old:
                node.output[index] = new


def _finish(model: ModelProto, source: ModelProto) -> None:
    remove_unused_initializers(model.graph)
    del model.graph.value_info[:]  # names of float tensors that are gone
    strip_metadata(model)
    used = {node.domain for node in model.graph.node}  # onnxruntime declares every domain that it knows
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    model.producer_name, model.producer_version = source.producer_name, source.producer_version
    helper.set_model_props(model, {entry.key: entry.value for entry in source.metadata_props})
