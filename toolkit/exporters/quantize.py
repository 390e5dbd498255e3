"""Static integer quantisation with onnxruntime: int8 symmetric per-channel weights, uint8 asymmetric activations.

Where asked for, activations are uint16 (no integer kernel of ONNX Runtime reads them), linear layers' weights int4.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from onnx import ModelProto

from toolkit import progress
from toolkit.artifacts import OnnxModel, Split
from toolkit.config import CalibrationName, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters import calibration_cache
from toolkit.exporters.admission import (
    COARSE_METHODS,
    fixed_batch,
    refuse_bad_weights,
    refuse_bits,
    refuse_missing_attack,
    refuse_optimised,
    refuse_quantised,
    zero_filters,
)
from toolkit.exporters.calibration import AdversarialShare, CalibrationReader, calibration_batch
from toolkit.exporters.engine import QuantizedModel, float_layers, save_integer_graph
from toolkit.exporters.equalization import Pair, equalized, pairs
from toolkit.exporters.four_bits import four_bit_layers, pack_four_bits
from toolkit.exporters.integers import build_integers, build_symmetric, preprocess, quantised_tensors
from toolkit.exporters.observer import activation_bytes, channel_peaks, observe
from toolkit.exporters.onnx import load_onnx, save_onnx
from toolkit.exporters.precision import COMPUTE
from toolkit.exporters.ranges import METHODS, Interval, choose_range, needs_histogram
from toolkit.exporters.tensorrt import tensorrt_faults
from toolkit.exporters.variants import DEPLOYED, Variant


def quantize_int8(
    model: OnnxModel,
    output: Path,
    calibration: Split,
    config: QuantizeConfig,
    *,
    input_margin: tuple[float, ...] | float = 0.0,
    adversarial: AdversarialShare | None = None,
    ranges: Mapping[str, Interval] = MappingProxyType({}),
) -> QuantizedModel:
    """Quantise a float graph in QDQ form, so that ONNX Runtime runs its layers in integers: `Quantizer`, used once."""
    quantizer = Quantizer(model, calibration, config, input_margin=input_margin, adversarial=adversarial, ranges=ranges)
    return quantizer.write(output)


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
        ranges: by tensor of the float graph, given in the place of what calibration finds.

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
        ranges: Mapping[str, Interval] = MappingProxyType({}),
    ) -> None:
        self._config, self._path, self._given = config, model.path, ranges
        refuse_bits(config)
        refuse_missing_attack(config, adversarial, model.path)
        self._source = load_onnx(model.path)
        refuse_quantised(self._source, model.path)
        refuse_optimised(self._source, model.path)
        refuse_bad_weights(self._source, model.path)
        fixed = fixed_batch(self._source, model.path, calibration)
        self._margin = float(np.max(np.atleast_1d(input_margin)))
        self._plain = preprocess(self._source)
        self._kept = float_layers(self._plain, config, model.path)
        self._four_bit = four_bit_layers(self._plain) if config.weight_bits == 4 else ()
        tensors = quantised_tensors(self._plain)
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
        self._pairs = self._scaled_pairs()
        with progress.task("calibrate", len(self._reader) * (1 + histograms + bool(self._pairs))) as task:
            self._reader.report_to(task)
            if self._pairs:
                peaks = channel_peaks(self._plain, [pair.tensor for pair in self._pairs], self._reader)
                self._plain = equalized(self._plain, {pair: peaks[pair.tensor] for pair in self._pairs})
            look = partial(observe, self._plain, tensors, self._reader, histograms=histograms)
            facts = {
                "images": _in_order(calibration),
                "tensors": tensors,
                "histograms": histograms,
                "margin": self._margin,
                "batch": self._reader.batch_size,
            }
            name = calibration_cache.key(self._plain, **facts)
            self._observed = look() if adversarial else calibration_cache.kept_or_observed(name, look)
        self._constant = {
            node.name: self._observed[node.input[0]].constant_channels
            for node in self._plain.graph.node
            if node.op_type in COMPUTE and node.input[0] in self._observed
        }
        _notice_constant(self._constant, zero_filters(self._plain))

    def _scaled_pairs(self) -> tuple[Pair, ...]:
        """Learnt ranges are those of tensors as they are; one scale for all filters, or 4 bits, would lose by it."""
        if not (self._config.equalize and self._config.per_channel) or self._given:
            return ()
        coarse = {node.output[0] for node in self._plain.graph.node if node.name in self._four_bit}
        return tuple(pair for pair in pairs(self._plain) if pair.second not in coarse)

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
    def rounded(self) -> ModelProto:
        """The float graph whose weights and activations are rounded: of the twin's function, scaled between layers."""
        return self._plain

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
        return replace(
            written,
            learnt_ranges=len(self._given.keys() & self._observed.keys()),
            equalized=len(self._pairs),
            constant_channels={name: count for name, count in self._constant.items() if count},
        )

    def write_variant(self, output: Path, variant: Variant, *, keep_float: Collection[str] = ()) -> None:
        """Write the integer graph as other machines or runtimes want it, to be compared; see `write`."""
        save_onnx(self._build({*self._kept, *keep_float}, variant), output)

    def write_tensorrt(self, output: Path) -> None:
        """Write the symmetric S8S8 graph that TensorRT wants, of the same ranges; see `exporters.tensorrt`.

        The layers that the configuration leaves float stay so.
        """
        made = build_symmetric(
            self._plain, self._source, self._chosen_ranges(), self._config, kept=self._kept, margin=self._margin
        )
        faults = tensorrt_faults(made, kept=self._kept)
        if faults:
            raise ToolkitError(
                "no file for TensorRT can be made of this graph",
                found="; ".join(faults),
                fix="leave --target tensorrt away, or export the network without what is named here",
            )
        save_onnx(made, output)

    def _chosen_ranges(self) -> dict[str, Interval]:
        method = self._method
        assert method is not None
        if method not in self._ranges:
            self._ranges[method] = {
                name: self._given[name]
                if name in self._given
                else choose_range(observed, method, self._config.percentile)
                for name, observed in self._observed.items()
            }
        return self._ranges[method]

    def _build(self, kept: Collection[str], variant: Variant = DEPLOYED) -> ModelProto:
        four = {*self._four_bit} - {*kept}
        built = build_integers(
            self._plain,
            self._source,
            self._chosen_ranges(),
            self._config,
            kept={*kept, *four},
            margin=self._margin,
            variant=variant,
            islands=kept,
        )
        return pack_four_bits(built, four) if four else built


def _notice_constant(activations: Mapping[str, int], filters: Mapping[str, int]) -> None:
    """Say what is quantised and carries nothing."""
    for what, counts in (("constant on the calibration images", activations), ("filters of zeros", filters)):
        named = {name: count for name, count in counts.items() if count}
        if named:
            where = ", ".join(f"{count} at '{name}'" for name, count in named.items())
            progress.notice(f"channels that carry nothing ({what}): {sum(named.values())} ({where})")


def _in_order(split: Split) -> str:
    """Names images and their order, of which batches are made."""
    return hashlib.sha256(split.hashes.astype("<u8").tobytes()).hexdigest()
