"""The engines of static quantisation by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from toolkit.artifacts import OnnxModel, Split, TorchModel
from toolkit.config import QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.exporters.calibration import AdversarialShare
from toolkit.exporters.engine import Writer
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.quantize_torch import TorchQuantizer, check_settings
from toolkit.exporters.ranges import Interval


@dataclass(frozen=True)
class Subject:
    """What is quantised, and by which images."""

    twin: OnnxModel
    calibration: Split
    network: TorchModel | None
    margin: tuple[float, ...] | float
    adversarial: AdversarialShare | None
    ranges: Mapping[str, Interval]


def make_writer(
    twin: OnnxModel,
    calibration: Split,
    config: QuantizeConfig,
    *,
    network: TorchModel | None,
    input_margin: tuple[float, ...] | float = 0.0,
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
        ranges: by tensor, given in the place of what calibration finds; the engine ort alone takes them.

    Raises:
        ToolkitError: the engine needs the network, or bad input of its own; see `Quantizer` and `TorchQuantizer`.
    """
    subject = Subject(twin, calibration, network, input_margin, adversarial, ranges)
    return ENGINES[config.engine](subject, config)


def check_engine(config: QuantizeConfig) -> None:
    """See that the engine is installed and has the calibration method, before a long run begins.

    Raises:
        ToolkitError: it is not, or has not.
    """
    if config.engine == "inc":
        check_settings(config)


def _ort(of: Subject, config: QuantizeConfig) -> Writer:
    return Quantizer(
        of.twin,
        of.calibration,
        config,
        input_margin=of.margin,
        adversarial=of.adversarial,
        ranges=of.ranges,
    )


def _inc(of: Subject, config: QuantizeConfig) -> Writer:
    if of.network is None:
        raise ToolkitError(
            "--engine inc calibrates the torch network",
            found=f"an ONNX file alone: {of.twin.path}",
            fix="give the checkpoint: `toolkit quantize MODEL.pt --engine inc` (model.pt of a bundle), or quantise the "
            "file with --engine ort",
        )
    return TorchQuantizer(
        of.network, of.twin, of.calibration, config, input_margin=of.margin, adversarial=of.adversarial
    )


ENGINES: Mapping[str, Callable[[Subject, QuantizeConfig], Writer]] = {"ort": _ort, "inc": _inc}
"""By the value of `--engine`."""
