"""From a float graph and the ranges of its activations to its QDQ form, written by onnxruntime's quantiser."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper, version_converter
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.quantize import save_tensors_data
from onnxruntime.quantization.shape_inference import quant_pre_process

from toolkit.config import QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.affine import norms_to_convolutions
from toolkit.exporters.input_folding import fold_normalization, move_quantiser_to_pixels, read_shape_from_image
from toolkit.exporters.input_range import LEVELS, InputGrid, covering_grid, pixel_map, symmetric_grid
from toolkit.exporters.onnx import with_names
from toolkit.exporters.precision import COMPUTE, FUSED, between_float
from toolkit.exporters.qdq import UNQUANTISED, finish, keep_islands_float, keep_logits_float
from toolkit.exporters.ranges import Interval
from toolkit.exporters.rewrites import rewrite
from toolkit.exporters.session import hide_log
from toolkit.exporters.tensorrt import symmetric_options
from toolkit.exporters.variants import DEPLOYED, Variant
from toolkit.exporters.zero_filters import refine_biases


@dataclass(frozen=True, slots=True)
class RoundedWeights:
    """The weights of one layer as an engine rounded them."""

    integers: npt.NDArray[np.int8]
    """As the layer reads them, or transposed."""
    scales: npt.NDArray[np.float32]
    """One, or one per output channel."""


PER_CHANNEL_OPSET = 13
"""The first whose DequantizeLinear takes a scale for each channel."""
QUANTISED_OPERATORS = [
    *COMPUTE, "Add", "Mul", "Relu", "LeakyRelu", "Clip", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool",
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Pad", "Split",
]  # fmt: skip
"""Operators with integer kernels in ONNX Runtime; LayerNormalization, Softmax and Gelu have none."""


def build_integers(
    plain: ModelProto,
    source: ModelProto,
    ranges: Mapping[str, Interval],
    config: QuantizeConfig,
    *,
    kept: Collection[str],
    margin: float,
    weights: Mapping[str, RoundedWeights] = MappingProxyType({}),
    variant: Variant = DEPLOYED,
    islands: Collection[str] | None = None,
) -> ModelProto:
    """A float graph in QDQ form.

    Args:
        plain: the graph as `preprocess` gives it; left as it is.
        source: the graph before that, whose metadata the result gets.
        ranges: what the quantisers of `quantised_tensors` represent; tensors without stay float.
        config: the granularity of weight scales, and the bits of activations.
        kept: the layers that stay float; layers that read or make a tensor without range must be among them.
        margin: pixels by which images may leave [0, 1]; the input quantiser represents them unclipped.
        weights: by a layer's name; others are rounded here, and all where they are to have seven bits.
        variant: what differs from the graph that ships.
        islands: of the layers `kept`, those to be left float by ONNX Runtime; others get int4 weights; None: all.
    """
    prepared = ModelProto()
    prepared.CopyFrom(plain)
    mapping = pixel_map(prepared)
    readers = {node.name for node in prepared.graph.node if mapping.tensor in node.input}
    wide = config.activation_bits == 16 and not variant.signed
    kind = QuantType.QInt8 if variant.signed else QuantType.QUInt16 if wide else QuantType.QUInt8
    unfolded = wide or variant.signed or bool(readers & set(kept))  # wide: in float, where folding gains nothing
    folded = None if unfolded else fold_normalization(prepared, mapping, margin)
    ends = float(mapping.of(-margin).min()), float(mapping.of(1 + margin).max())
    grid = symmetric_grid(*ends) if variant.signed else covering_grid(*ends, LEVELS_WIDE if wide else LEVELS)
    if folded is not None:
        grid = InputGrid(np.ones(1), folded.quantiser.zero_point + folded.mean_steps)
    overrides, given = {mapping.tensor: _activation(grid, kind)}, {}
    for node in prepared.graph.node:
        known = node.name in weights and node.name not in kept and not (config.reduce_range or variant.reduce_range)
        factor = _factor(node, plain, prepared) if known else None
        if factor is not None:
            overrides[node.input[1]] = _scales(node, weights[node.name], factor)
            given[node.name] = weights[node.name].integers
    unknown = {mapping.tensor}.union(quantised_tensors(prepared)).difference(ranges, {mapping.tensor})
    left_float = {
        *kept,
        *between_float(prepared, kept, () if islands is None else {*kept} - {*islands}),
        *(node.name for node in pixel_map(prepared).nodes),
        *(node.name for node in prepared.graph.node if unknown.intersection((*node.input, *node.output))),
        *_left_float(prepared),
    }
    if config.per_channel and not wide:  # one scale for all channels would round factors of very different size
        norms_to_convolutions(prepared, keep=left_float)
    quantised = _run_onnxruntime(
        prepared,
        ranges,
        {
            "ActivationSymmetric": variant.signed,
            "WeightSymmetric": True,
            # Of 16-bit sums an int32 bias may overflow, and onnxruntime would make weights coarser to prevent it.
            "QuantizeBias": not (wide or variant.float_bias),
            "TensorQuantOverrides": overrides,
        },
        left_float,
        per_channel=config.per_channel,
        activations=kind,
        reduce_range=config.reduce_range or variant.reduce_range,
    )
    _set_integers(quantised, given)
    refine_biases(quantised, prepared)
    if folded is not None:
        move_quantiser_to_pixels(quantised, mapping, folded.quantiser)
    keep_logits_float(quantised)
    keep_islands_float(quantised, kept if islands is None else islands)
    finish(quantised, source)
    return quantised


def build_symmetric(
    plain: ModelProto,
    source: ModelProto,
    ranges: Mapping[str, Interval],
    config: QuantizeConfig,
    *,
    kept: Collection[str],
    margin: float,
) -> ModelProto:
    """The symmetric S8S8 graph that TensorRT wants (`exporters.tensorrt`); arguments as of `build_integers`."""
    prepared = ModelProto()
    prepared.CopyFrom(plain)
    made = _run_onnxruntime(
        prepared,
        ranges,
        symmetric_options(pixel_map(prepared), margin),
        {*kept, *_left_float(prepared)},
        per_channel=config.per_channel,
        activations=QuantType.QInt8,
        operators=COMPUTE,
    )
    finish(made, source)
    return made


def preprocess(source: ModelProto) -> ModelProto:
    """A float graph with inferred shapes, exact rewrites done, and what can be folded before quantisation folded.

    Raises:
        ToolkitError: ONNX Runtime's preparation does not understand the graph.
    """
    hide_log()
    model = rewrite(with_names(_recent(source)))
    read_shape_from_image(model, pixel_map(model))
    with tempfile.TemporaryDirectory(prefix="toolkit-quantize-") as folder, _silence():
        path = Path(folder, "float.onnx")
        try:
            quant_pre_process(model, str(path))
        except Exception as error:  # what its shape inference trips over
            operators = sorted({node.op_type for node in model.graph.node})
            raise ToolkitError(
                "ONNX Runtime cannot prepare the graph for quantisation",
                found=f"{type(error).__name__} {str(error).partition(chr(10))[0]}".strip()
                + f", in a graph of opset {_opset(model)} with {', '.join(operators)}",
                fix="export the network with --opset 20, in which attention stands as single operators",
            ) from error
        return onnx.load(path)


def _recent(model: ModelProto) -> ModelProto:
    """At an opset that has scales per channel.

    Raises:
        ToolkitError: it cannot be converted.
    """
    version = _opset(model)
    if version is None or version >= PER_CHANNEL_OPSET:
        return model
    try:
        return version_converter.convert_version(model, PER_CHANNEL_OPSET)
    except Exception as error:  # the converter raises what its C++ says
        raise ToolkitError(
            f"the file is of an opset that has no scales per channel, and cannot be converted to {PER_CHANNEL_OPSET}",
            found=f"opset {version}: {str(error).splitlines()[0]}",
            fix=f"export the network again with opset {PER_CHANNEL_OPSET} or later",
        ) from error


def _opset(model: ModelProto) -> int | None:
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)


def quantised_tensors(model: ModelProto) -> tuple[str, ...]:
    """The float tensors, constants left out, that operators with integer kernels read or make."""
    graph = model.graph
    constants = {item.name for item in graph.initializer}
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output, *graph.input)}
    found = dict.fromkeys(
        name
        for node in graph.node
        if node.op_type in (*QUANTISED_OPERATORS, "BatchNormalization")  # see exporters.affine
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
            nodes_to_exclude=[*left_float],
            per_channel=per_channel,
            reduce_range=reduce_range,
            activation_type=activations,
            weight_type=QuantType.QInt8,
            calibration_cache_path=cache,
            extra_options=options,
        )
        return onnx.load(after)


LEVELS_WIDE = 65535
"""Steps between the ends of a uint16 grid."""
KINDS = {QuantType.QInt8: np.int8, QuantType.QUInt8: np.uint8, QuantType.QUInt16: np.uint16}


def _activation(grid: InputGrid, kind: QuantType) -> list[dict[str, Any]]:
    step, zero_point = np.array(grid.step[0], dtype=np.float32), np.array(grid.zero_point, dtype=KINDS[kind])
    if step < grid.step[0]:  # float32 must not round the ends of the range inwards
        step = np.array(np.nextafter(step, np.float32(np.inf)))
    return [{"scale": step, "zero_point": zero_point}]


def _factor(node: NodeProto, plain: ModelProto, prepared: ModelProto) -> float | None:
    """By what a folded input multiplied the weights of a layer; None: by several factors, or they are no constant."""
    before, after = (
        next((numpy_helper.to_array(item) for item in model.graph.initializer if item.name == node.input[1]), None)
        for model in (plain, prepared)
    )
    if before is None or after is None:
        return None
    peak = int(np.abs(before).argmax())
    factor = float(after.flat[peak] / before.flat[peak]) if before.flat[peak] else 1.0
    return factor if np.allclose(before * factor, after, rtol=1e-5, atol=0) else None


def _scales(node: NodeProto, weights: RoundedWeights, factor: float) -> list[dict[str, Any]]:
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    axis = 0 if node.op_type == "Conv" or transposed else 1
    shared = {} if weights.scales.size == 1 else {"axis": axis}
    zero = np.array(0, dtype=np.int8)
    return [
        {"scale": np.array(scale * factor, dtype=np.float32), "zero_point": zero, **shared} for scale in weights.scales
    ]


def _set_integers(quantised: ModelProto, given: Mapping[str, npt.NDArray[np.int8]]) -> None:
    """Put integers in the place of those that differ from them by the rounding of ties, in place."""
    constants = {item.name: item for item in quantised.graph.initializer}
    producers = {name: node for node in quantised.graph.node for name in node.output}
    for node in quantised.graph.node:
        if node.name in given:
            item, integers = constants[producers[node.input[1]].input[0]], given[node.name]
            integers = integers if integers.shape == tuple(item.dims) else integers.T
            item.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(integers), item.name))


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

    A Relu or Clip right behind a convolution stays: it fuses into the layer. Behind a last Gemm or MatMul, whose output
    is not quantised, it would be lost: ONNX Runtime lets the quantiser do its work.
    """
    reaches: set[str] = set()
    tail = []
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in reversed(model.graph.node):
        if node.op_type in COMPUTE or any(name in reaches for name in node.output):
            reaches.update(node.input)
            continue
        source = producers.get(node.input[0]) if node.input else None
        fuses = node.op_type in FUSED and source is not None and source.op_type in {*COMPUTE} - UNQUANTISED
        if not fuses:
            tail.append(node.name)
    return tail
