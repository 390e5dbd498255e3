"""The engines of static quantisation by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from toolkit.artifacts import OnnxModel, Split, TorchModel
from toolkit.config import QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.calibration import AdversarialShare
from toolkit.exporters.engine import Writer
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.quantize_torch import TorchQuantizer, check_settings

Margin = tuple[float, ...] | float


def make_writer(
    twin: OnnxModel,
    calibration: Split,
    config: QuantizeConfig,
    *,
    network: TorchModel | None,
    input_margin: Margin = 0.0,
    adversarial: AdversarialShare | None = None,
) -> Writer:
    """A writer of integer graphs by the engine that the configuration names, calibrated.

    Args:
        twin: the float graph.
        calibration: images that set the activations' ranges.
        config: engine, calibration method, layers left float.
        network: what the graph was exported from; None: there is a file alone.
        input_margin: pixels by which images may leave [0, 1].
        adversarial: the attack for `config.calibrate_adversarial`.

    Raises:
        ToolkitError: the engine needs the network, or bad input of its own; see `Quantizer` and `TorchQuantizer`.
    """
    return ENGINES[config.engine](twin, calibration, config, network, input_margin, adversarial)


def check_engine(config: QuantizeConfig) -> None:
    """See that the engine is installed and has the calibration method, before a long run begins.

    Raises:
        ToolkitError: it is not, or has not.
    """
    if config.engine == "inc":
        check_settings(config)


def _ort(
    twin: OnnxModel,
    calibration: Split,
    config: QuantizeConfig,
    _: TorchModel | None,
    margin: Margin,
    adversarial: AdversarialShare | None,
) -> Writer:
    return Quantizer(twin, calibration, config, input_margin=margin, adversarial=adversarial)


def _inc(
    twin: OnnxModel,
    calibration: Split,
    config: QuantizeConfig,
    network: TorchModel | None,
    margin: Margin,
    adversarial: AdversarialShare | None,
) -> Writer:
    if network is None:
        raise ToolkitError(
            "--engine inc calibrates the torch network",
            found=f"an ONNX file alone: {twin.path}",
            fix="give the checkpoint: `toolkit quantize MODEL.pt --engine inc` (model.pt of a bundle), or quantise the "
            "file with --engine ort",
        )
    return TorchQuantizer(network, twin, calibration, config, input_margin=margin, adversarial=adversarial)


Engine = Callable[[OnnxModel, Split, QuantizeConfig, TorchModel | None, Margin, AdversarialShare | None], Writer]
ENGINES: Mapping[str, Engine] = {"ort": _ort, "inc": _inc}
"""By the value of `--engine`."""
