"""The engines of static quantisation by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from toolkit.artifacts import OnnxModel, Split, TorchModel
from toolkit.config import QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.calibration import AdversarialShare
from toolkit.exporters.engine import Writer
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.quantize_torch import TorchQuantizer, check_settings
from toolkit.exporters.ranges import Interval

Margin = tuple[float, ...] | float


def make_writer(
    twin: OnnxModel,
    calibration: Split,
    config: QuantizeConfig,
    *,
    network: TorchModel | None,
    input_margin: Margin = 0.0,
    adversarial: AdversarialShare | None = None,
    ranges: Mapping[str, Interval] = MappingProxyType({}),
) -> Writer:
    """A writer of integer graphs by the engine that the configuration names, calibrated.

    Args:
        twin: the float graph.
        calibration: images that set the activations' ranges.
        config: engine, calibration method, layers left float.
        network: what the graph was exported from; None: there is a file alone.
        input_margin: pixels by which images may leave [0, 1].
        adversarial: the attack for `config.calibrate_adversarial`.
        ranges: of tensors by name that need no calibration, because a training learnt them; for the engine ort.

    Raises:
        ToolkitError: the engine needs the network, or bad input of its own; see `Quantizer` and `TorchQuantizer`.
    """
    if config.engine == "ort":
        return Quantizer(twin, calibration, config, input_margin=input_margin, adversarial=adversarial, ranges=ranges)
    if network is None:
        raise ToolkitError(
            "--engine inc calibrates the torch network",
            found=f"an ONNX file alone: {twin.path}",
            fix="give the checkpoint: `toolkit quantize MODEL.pt --engine inc` (model.pt of a bundle), or quantise the "
            "file with --engine ort",
        )
    return TorchQuantizer(network, twin, calibration, config, input_margin=input_margin, adversarial=adversarial)


def check_engine(config: QuantizeConfig) -> None:
    """See that the engine is installed and has the calibration method, before a long run begins.

    Raises:
        ToolkitError: it is not, or has not.
    """
    if config.engine == "inc":
        check_settings(config)
