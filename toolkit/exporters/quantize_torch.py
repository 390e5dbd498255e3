"""Static integer quantisation with Intel Neural Compressor, which calibrates the torch network by PyTorch's PT2E."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

from toolkit import progress
from toolkit.artifacts import OnnxModel, Split, TorchModel
from toolkit.config import CalibrationName, QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.admission import refuse_bad_weights, refuse_missing_attack
from toolkit.exporters.calibration import AdversarialShare, CalibrationReader, calibration_batch
from toolkit.exporters.engine import QuantizedModel, float_layers, save_integer_graph
from toolkit.exporters.integers import preprocess, quantised_tensors
from toolkit.exporters.observer import activation_bytes, no_finite_numbers
from toolkit.exporters.onnx import BATCH, INPUT, example_images, load_onnx, save_onnx, silence
from toolkit.exporters.precision import COMPUTE
from toolkit.exporters.pt2e import Arithmetic, complete, convert, read_arithmetic, require, write_arithmetic
from toolkit.exporters.variants import DEPLOYED, Variant

METHODS: Mapping[CalibrationName, str] = {"minmax": "minmax", "entropy": "kl"}
"""By our name for it, what Neural Compressor calls the method.

What it does under these names (3.10): `minmax` is a moving average of the batches' extremes, which begins at those of
the first batch and moves by a hundredth; `kl` cuts a histogram where the squared error of rounding is least."""


class TorchQuantizer:
    """A torch network with what Neural Compressor finds its activations to be like; writes integer graphs.

    Weights and activations are rounded as Neural Compressor says. What its calibration does not look at and integer
    kernels of ONNX Runtime write in 8 bits (summands, pooled values) gets observers of the same kind. Layers that it
    has in float stay float. Input quantiser and float logits are those of `Quantizer`'s graphs.

    Args:
        network: what is calibrated; left as it is.
        twin: its float twin, over which graphs are written.
        calibration: images that set the activations' ranges, streamed.
        config: the calibration method, and which layers stay float.
        input_margin: pixels by which images may leave [0, 1]. If there are any, every batch comes a second time,
            stretched over the margin, and these come first: a moving average hardly leaves where it began.
        adversarial: the attack for `config.calibrate_adversarial`; needed where that is above 0.

    Raises:
        ToolkitError: Neural Compressor is not installed, does not have the method or cannot handle the network; or its
            weights or activations are no numbers, there are no images, or attacked ones with no attack to make them.
    """

    def __init__(
        self,
        network: TorchModel,
        twin: OnnxModel,
        calibration: Split,
        config: QuantizeConfig,
        *,
        input_margin: tuple[float, ...] | float = 0.0,
        adversarial: AdversarialShare | None = None,
    ) -> None:
        methods = check_settings(config)
        refuse_missing_attack(config, adversarial, twin.path)
        self._config, self._source = config, load_onnx(twin.path)
        refuse_bad_weights(self._source, twin.path)
        self._margin = float(np.max(np.atleast_1d(input_margin)))
        self._plain = plain = preprocess(self._source)
        self._kept = float_layers(plain, config, twin.path)
        self._reader = CalibrationReader(
            calibration,
            INPUT,
            margin=self._margin,
            batch_size=calibration_batch(activation_bytes(plain, quantised_tensors(plain))),
            adversarial=adversarial,
        )
        self._method = methods[0] if len(methods) == 1 else None
        with progress.task("calibrate", len(self._reader) * len(methods)) as task:
            self._reader.report_to(task)
            self._found = {method: self._calibrate(network, method) for method in methods}

    @property
    def methods(self) -> tuple[CalibrationName, ...]:
        """The calibration methods that `with_calibration` takes."""
        return tuple(METHODS)

    @property
    def kept(self) -> tuple[str, ...]:
        """The layers that the configuration leaves float."""
        return self._kept

    @property
    def rounded(self) -> ModelProto:
        """The float graph whose weights and activations are rounded."""
        return self._plain

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers, in the order of the graph."""
        return tuple(node.name for node in self._plain.graph.node if node.op_type in COMPUTE)

    def with_calibration(self, method: CalibrationName) -> TorchQuantizer:
        """One that writes graphs with another method; of a configuration with `auto`, which holds for all of them."""
        if method not in self._found:
            raise ValueError(f"statistics were gathered for {', '.join(self._found)} alone")
        other = copy.copy(self)
        other._method = method
        return other

    def write(self, output: Path, *, keep_float: Collection[str] = ()) -> QuantizedModel:
        """Write the integer graph, with further layers left float.

        Raises:
            ValueError: the configuration leaves the calibration method open; see `with_calibration`.
        """
        graph, kept = self._build(keep_float)
        assert self._method is not None
        return save_integer_graph(
            graph,
            output,
            engine="neural-compressor",
            calibration=self._method,
            reader=self._reader,
            per_channel=self._config.per_channel,
            kept=kept,
        )

    def write_variant(self, output: Path, variant: Variant, *, keep_float: Collection[str] = ()) -> None:
        """Write the integer graph as other machines or runtimes want it, to be compared; see `write`."""
        graph, _ = self._build(keep_float, variant)
        save_onnx(graph, output)

    def _build(self, keep_float: Collection[str], variant: Variant = DEPLOYED) -> tuple[ModelProto, tuple[str, ...]]:
        if self._method is None:
            raise ValueError("no calibration method is chosen")
        kept = (*self._kept, *keep_float)
        found = self._found[self._method]
        return write_arithmetic(found, self._source, self._config, kept=kept, margin=self._margin, variant=variant)

    def _calibrate(self, network: TorchModel, method: CalibrationName) -> Arithmetic:
        shape = network.spec.input_shape
        with silence():
            try:
                prepared = _prepare(network, METHODS[method], per_channel=self._config.per_channel)
                complete(prepared)
            except Exception as error:  # tracing runs the network's own code, which may raise anything
                raise _cannot_handle(error) from error
        self._observe(prepared)
        with silence():
            try:
                converted = convert(prepared)
            except (RuntimeError, ValueError, AssertionError) as error:
                raise _cannot_handle(error) from error
        found = read_arithmetic(converted, self._source, shape)
        for name, ends in found.ranges.items():
            if not all(map(math.isfinite, ends)):
                raise no_finite_numbers(name)
        return found

    def _observe(self, prepared: torch.fx.GraphModule) -> None:
        """Show the calibration images to a prepared model, stretched ones first."""
        half = len(self._reader) // 2 if self._margin > 0 else 0
        for start, end in ((half, len(self._reader)), (0, half)):
            self._reader.set_range(start, end)
            for feed in iter(self._reader.get_next, None):
                with torch.no_grad():
                    logits = prepared(torch.from_numpy(feed[INPUT]))
                if not bool(torch.isfinite(logits).all()):
                    raise no_finite_numbers("logits")


def check_settings(config: QuantizeConfig) -> tuple[CalibrationName, ...]:
    """The methods to calibrate by, once it is seen that they and the packages are there.

    Raises:
        ToolkitError: they are not.
    """
    for package in ("torchao", "neural_compressor"):
        require(package)
    if (config.weight_bits, config.activation_bits) != (8, 8):
        raise ToolkitError(
            "the engine inc quantises to 8 bits",
            found=f"--engine inc with weights of {config.weight_bits} and activations of {config.activation_bits} bits",
            fix="leave the bits at 8, or choose --engine ort",
        )
    if config.calibrate == "auto":
        return tuple(METHODS)
    if config.calibrate not in METHODS:
        raise ToolkitError(
            "the engine inc does not have this calibration method",
            found=f"--calibrate {config.calibrate} with --engine inc",
            fix=f"choose --calibrate {', '.join(METHODS)} or auto, or calibrate with --engine ort",
        )
    return (config.calibrate,)


def _prepare(network: TorchModel, algorithm: str, *, per_channel: bool) -> torch.fx.GraphModule:
    """The network as Neural Compressor makes it ready for calibration."""
    from neural_compressor.torch.export import export
    from neural_compressor.torch.quantization import StaticQuantConfig, prepare

    module = network.copy().module.cpu().float().eval()
    config: Any = StaticQuantConfig(
        w_sym=True,
        act_sym=False,
        act_algo=algorithm,
        w_granularity="per_channel" if per_channel else "per_tensor",
    )
    traced = export(module, (example_images(network.spec.input_shape),), dynamic_shapes=({0: torch.export.Dim(BATCH)},))
    prepared: torch.fx.GraphModule = prepare(traced, quant_config=config)
    return prepared


def _cannot_handle(error: Exception) -> ToolkitError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return ToolkitError(
        "Neural Compressor cannot handle the network",
        found=reason[0][:200],
        fix="quantise with --engine ort, or rewrite that part of forward() without branches on tensor values",
    )
