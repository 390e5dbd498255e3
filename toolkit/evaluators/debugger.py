"""Where an integer graph loses its accuracy: noise of every quantised tensor, and what each layer is to blame for.

Three questions that are often taken for one. How noisy is a tensor: signal-to-noise ratio between the float graph's
tensor and the integer graph's, on real images, and of the rounding of that tensor alone. Who is to blame: by how much
the error of the logits, and of the margins under attack, shrinks when one layer alone is left float. And what it costs:
the accuracy that is lost, in all and with one layer alone in integers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, numpy_helper

from toolkit.artifacts import Split
from toolkit.evaluators.judge import Drop, Judge
from toolkit.evaluators.sensitivity import LayerSensitivity, measure_sensitivity
from toolkit.exporters.calibration import calibration_batch
from toolkit.exporters.engine import Writer
from toolkit.exporters.observer import activation_bytes, exposed_session
from toolkit.exporters.onnx import load_onnx
from toolkit.exporters.precision import COMPUTE
from toolkit.progress import task

DEQUANTISED = "_DequantizeLinear_Output"
"""What onnxruntime adds to a tensor's name behind its quantiser."""
CLIPPED = 0.001
"""Share of clipped values from which clipping is the first suspect."""
COARSE_DB = 25.0
"""A tensor's own rounding is coarse below this; 8 bits over values spread evenly come to 50 dB."""
GUILTY, NOTICEABLE = 0.1, 1e-3
"""Share of the error of logits or margins, and share of the logits' variance, from which a layer's part in it is worth
a remedy."""
COSTLY = 0.005
"""Accuracy lost, clean or robust, from which a layer that the attack makes use of is worth leaving float."""
SENSITIVITY_S = 120.0
"""Seconds for the accuracy that single layers lose, about."""
BATCH = 64

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TensorNoise:
    """One quantised activation; ratios in decibel, infinite where there is no noise."""

    tensor: str
    snr: float
    """Of the integer graph's tensor against the float graph's: all noise so far."""
    own_snr: float
    """Of rounding and clipping the float graph's tensor alone."""
    clipped: float
    """Share of its values outside of what the quantiser represents."""

    @property
    def advice(self) -> str:
        """What to try; empty where the rounding of the tensor itself is fine."""
        if self.own_snr >= COARSE_DB:
            return ""
        if self.clipped >= CLIPPED:
            return "what it reads is clipped: --calibrate minmax"
        return "what it reads has a long tail: --calibrate percentile or mse"


@dataclass(frozen=True, slots=True)
class LayerBlame:
    """One integer layer."""

    layer: str
    relief: float
    """Share of the logits' mean squared error that is gone with this layer alone in float; may be negative."""
    source: TensorNoise | None
    """The activation that it reads; None: not a quantised one of the float graph."""
    gone: float
    """Error that is gone with it, as a share of the variance of the logits."""
    sensitivity: LayerSensitivity | None = None
    """Under attack, and of accuracy; None: of a layer that is not among those that can be changed."""
    costly: bool = False
    """Whether the whole graph loses so much accuracy that this layer may be worth leaving float."""

    @property
    def guilt(self) -> float:
        """Share of the error that is gone with it: of the margins under attack, where there is one, or the logits."""
        return self.relief if self.sensitivity is None else self.sensitivity.relief

    @property
    def advice(self) -> str:
        """What to try; empty for a layer that is not worth it.

        A coarse quantiser of what it reads comes first: it stays where the layer alone is left float.
        """
        if self.source is not None and self.source.advice:
            return self.source.advice
        guilty = (self.costly and self.guilt >= GUILTY) or (self.relief >= GUILTY and self.gone >= NOTICEABLE)
        return f"--keep-float {self.layer}" if guilty else ""


@dataclass(frozen=True)
class Explanation:
    """What the error of an integer graph consists of."""

    logit_error: float
    """Mean squared difference of the logits from the float graph's, over their variance."""
    drop: Drop
    """Accuracy lost against the float graph."""
    images: int
    """Of the judge."""
    margin_images: int
    """Of these, attacked ones on whose margins `sensitivity` looks; 0: on clean logits."""
    tensor_images: int
    """For the noise of tensors."""
    layers: tuple[LayerBlame, ...]
    """The guilty first."""
    tensors: tuple[TensorNoise, ...]
    """From the image to the logits."""

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data; None for infinite ratios."""
        layers = [{**_plain(asdict(blame)), "advice": blame.advice} for blame in self.layers]
        for row, blame in zip(layers, self.layers, strict=True):
            row["source"] = blame.source and _plain(asdict(blame.source))
            del row["costly"]
        tensors = [_plain(asdict(noise)) for noise in self.tensors]
        found = {name: getattr(self, name) for name in ("logit_error", "images", "margin_images", "tensor_images")}
        return {**found, "drop": asdict(self.drop), "layers": layers, "tensors": tensors}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}


def explain(quantizer: Writer, deployed: Path, split: Split, judge: Judge) -> Explanation:
    """Find out which layers and tensors an integer graph loses accuracy in.

    Args:
        quantizer: that wrote it; writes it again with each layer in float.
        deployed: the integer graph.
        split: images for the tensors' noise.
        judge: of accuracy, with images of its own.
    """
    tensors = tensor_noise(quantizer.rounded, load_onnx(deployed), split)
    known = {noise.tensor: noise for noise in tensors}
    sources = _sources(load_onnx(deployed))
    total, drop = judge.disturbance(deployed), judge.drop(deployed)
    layers = [name for name in quantizer.layers if name in sources]
    changeable = [name for name in quantizer.layers if name not in quantizer.kept]
    with task("explain", len(changeable)) as bar:
        measured = measure_sensitivity(quantizer, changeable, judge, seconds=SENSITIVITY_S, advance=bar.advance)
    sensitivity = {one.layer: one for one in measured}
    costly = drop.worst > COSTLY and len(changeable) > 1
    blames = []
    for layer in layers:
        one = sensitivity.get(layer)
        relief = one.logits if one and len(changeable) > 1 else 0.0
        gone = relief * total / judge.spread**2
        blames.append(LayerBlame(layer, relief, known.get(sources[layer]), gone, one, costly))
    ordered = sorted(blames, key=lambda blame: -blame.guilt)
    error = total / judge.spread**2
    return Explanation(error, drop, judge.images, judge.margin_images, len(split), tuple(ordered), tensors)


def tensor_noise(fp32: ModelProto, deployed: ModelProto, split: Split) -> tuple[TensorNoise, ...]:
    """The noise of every activation that both graphs have, in the order of the integer graph; images are streamed."""
    constants = {item.name: numpy_helper.to_array(item) for item in deployed.graph.initializer}
    made = {name for node in fp32.graph.node for name in node.output} | {fp32.graph.input[0].name}
    before = {node.output[0]: node for node in deployed.graph.node if node.op_type == "QuantizeLinear"}
    # a quantiser that holds a normalisation has another scale on either side: its tensor is not the float graph's
    quantisers = {
        _stem(node.output[0]): node
        for node in deployed.graph.node
        if node.op_type == "DequantizeLinear"
        and node.input[0] in before
        and before[node.input[0]].input[1] == node.input[1]
        and _stem(node.output[0]) in made
    }
    names = list(quantisers)
    grids = {name: _grid(node, constants) for name, node in quantisers.items()}
    sums = {name: _Sums() for name in names}
    with tempfile.TemporaryDirectory(prefix="toolkit-explain-") as folder:
        float_path, integer_path = Path(folder, "float.onnx"), Path(folder, "integer.onnx")
        float_run = exposed_session(fp32, names, float_path)
        outputs = [node.output[0] for node in quantisers.values()]
        integer_run = exposed_session(deployed, outputs, integer_path, optimized=False)
        for images in _batches(split, fp32, names):
            theirs, ours = _tensors(float_run, names, images), _tensors(integer_run, outputs, images)
            for name, own, reference in zip(names, ours, theirs, strict=True):
                sums[name].add(reference, own, grids[name])
    return tuple(sums[name].result(name) for name in names)


def _sources(deployed: ModelProto) -> dict[str, str]:
    """By integer layer: the float graph's name of the activation that it reads."""
    dequantised = {node.output[0] for node in deployed.graph.node if node.op_type == "DequantizeLinear"}
    return {
        node.name: _stem(node.input[0])
        for node in deployed.graph.node
        if node.op_type in COMPUTE and set(node.input[:2]) <= dequantised
    }


def _stem(name: str) -> str:
    return name.removesuffix(DEQUANTISED)


def _grid(node: NodeProto, constants: Mapping[str, Any]) -> tuple[Array, int, int, int]:
    """Scale, zero point, and the ends of the integers."""
    scale, zero_point = np.asarray(constants[node.input[1]], np.float64), constants[node.input[2]]
    ends = np.iinfo(zero_point.dtype)
    return scale, int(zero_point.ravel()[0]), int(ends.min), int(ends.max)


def _batches(split: Split, fp32: ModelProto, names: Sequence[str]) -> Iterator[npt.NDArray[np.float32]]:
    """As many images at a time as the graph takes, whose tensors in both graphs fit into memory."""
    fixed: int = fp32.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    size = fixed or min(BATCH, calibration_batch(3 * activation_bytes(fp32, names)))
    end = len(split) - len(split) % fixed if fixed else len(split)
    for start in range(0, end, size):
        yield split.take(np.arange(start, min(start + size, end))).images.numpy()


def _tensors(session: Any, names: Sequence[str], images: npt.NDArray[np.float32]) -> Iterator[Array]:
    given = session.get_inputs()[0].name
    wanted = [name for name in names if name != given]
    found = dict(zip(wanted, session.run(wanted, {given: images}), strict=True)) if wanted else {}
    for name in names:  # one after the other, since twice as wide
        yield np.asarray(images if name == given else found.pop(name), np.float64)


@dataclass
class _Sums:
    """Of squares over all images."""

    signal: float = 0.0
    noise: float = 0.0
    own: float = 0.0
    clipped: int = 0
    count: int = field(default=0)

    def add(self, float_values: Array, integer_values: Array, grid: tuple[Array, int, int, int]) -> None:
        scale, zero_point, low, high = grid
        levels = np.round(float_values / scale) + zero_point
        rounded = (np.clip(levels, low, high) - zero_point) * scale
        self.signal += float((float_values**2).sum())
        self.noise += float(((integer_values.reshape(float_values.shape) - float_values) ** 2).sum())
        self.own += float(((rounded - float_values) ** 2).sum())
        self.clipped += int(((levels < low) | (levels > high)).sum())
        self.count += float_values.size

    def result(self, name: str) -> TensorNoise:
        return TensorNoise(
            name, decibel(self.signal, self.noise), decibel(self.signal, self.own), self.clipped / max(1, self.count)
        )


def decibel(signal: float, noise: float) -> float:
    """Ten times the logarithm of the ratio of two powers."""
    if noise <= 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else float("-inf")
