"""The fake-quantised form of a torch network: what papers simulate, made without a look at the integer graph.

Weights and activations are rounded to the grid that integers would have and stay floats, with straight-through
gradients (Bengio et al. 2013; Jacob et al. 2018). It is a surrogate for attacks, not for training: the weights are
rounded once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from toolkit.artifacts import Split, TorchModel
from toolkit.attacks.surrogate import probe_images
from toolkit.errors import ToolkitError
from toolkit.evaluators.rounding import Grid, activation_grid, pixel_grid, quantise_weights, round_to
from toolkit.exporters.calibration import CalibrationReader

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Multiply and accumulate; everything between them computes on what their quantised inputs and weights give."""
MAX_BITS = 16
Range = tuple[float, float]
"""Least and largest value of a tensor."""


class QuantisedReLU(nn.Module):
    """ReLU and the rounding of its output in one: a grid that begins at 0 clips what is negative.

    Args:
        grid: with `lowest` and `origin` 0. It is no tensor, so that casts of the network leave its step exact.
    """

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, values: Tensor) -> Tensor:
        return round_to(values, self.grid, rectify=True)


@dataclass(frozen=True, slots=True)
class _QuantiseInput:
    """Forward pre-hook of a layer: its first argument is rounded."""

    grid: Grid

    def __call__(self, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (round_to(arguments[0], self.grid), *arguments[1:])


def fake_quantise(
    model: TorchModel,
    calibration: Split,
    *,
    weight_bits: int | None = 8,
    activation_bits: int | None = 8,
    per_channel: bool = True,
    margin: float = 0.0,
    float_weights: Collection[str] = (),
    ranges: Mapping[str, Range] | None = None,
) -> TorchModel:
    """A copy of `model` whose convolutions and linear layers multiply rounded weights by rounded inputs.

    Activations are rounded where a layer reads them, or at the ReLU that makes them, in grids over the least and
    largest value that the calibration images cause; the pixels' grid covers [-margin, 1 + margin]. Biases, logits, sums
    and pooling between layers stay float. Attention keeps float products of activations
    and float weights of its own.

    Args:
        model: a float network, pruned and tuned as it may be.
        calibration: images that set the activations' ranges, streamed.
        weight_bits: 1 to 16; symmetric, see `quantise_weights`. None: they stay float.
        activation_bits: 1 to 16; asymmetric, see `activation_grid`. None: they stay float.
        per_channel: weights have a scale per output channel.
        margin: pixels by which attacked images may leave [0, 1]; the images come a second time stretched over it.
        float_weights: names of weights, as `state_dict` of the module with its normalisation has them; their layers
            stay as they are.
        ranges: what a `RangeRecorder` saw, in place of what calibration images cause.

    Raises:
        ToolkitError: bits out of range, no layers, no images, or a network whose activations are not finite.
    """
    for name, bits in (("weights", weight_bits), ("activations", activation_bits)):
        _check_bits(name, bits)
    copied = model.copy()
    network = copied.module.eval().requires_grad_(False).network
    layers = _layers(network)
    kept = {name for name in layers if f"network.{name}.weight" in float_weights}
    if not layers:
        raise ToolkitError(
            "the network has nothing to quantise",
            found=f"no convolution and no linear layer among {len(list(network.modules()))} modules",
            fix="give a network whose layers are modules: nn.Conv2d, nn.Linear",
        )
    layers = {name: module for name, module in layers.items() if name not in kept}
    if activation_bits is not None:
        sites = _find_sites(copied, layers)
        if ranges is None:
            ranges = _observe(copied, sites, CalibrationReader(calibration, "image", margin=margin))
        _round_activations(copied, layers, sites, ranges, margin, activation_bits)
    if weight_bits is not None:
        for layer in layers.values():
            _round_weights(layer, weight_bits, per_channel)
    return copied


def _round_activations(
    model: TorchModel,
    layers: Mapping[str, nn.Module],
    sites: Mapping[str, Site],
    ranges: Mapping[str, Range],
    margin: float,
    bits: int,
) -> None:
    """Round, in place, what the layers read."""
    for name, layer in layers.items():
        if sites.get(name) == "pixels":
            _hook(layer, _QuantiseInput(pixel_grid(model.spec.normalization, margin, bits)))
        elif name in ranges:
            _hook(layer, _QuantiseInput(activation_grid(*ranges[name], bits)))
    for name, site in sites.items():
        if site == "output":
            model.network.set_submodule(name, QuantisedReLU(activation_grid(0.0, ranges[name][1], bits)))


class RangeRecorder:
    """The ranges of activations that `fake_quantise` needs, over what a network computes while it is trained.

    An observer of a training (`training.loop.train`). Static quantisation after fine-tuning is done so in places: the
    ranges are those over all batches of the fine-tuning, the weights that they came from moving meanwhile.

    Args:
        model: the network that is going to be trained.
    """

    def __init__(self, model: TorchModel) -> None:
        copied = model.copy()
        self._sites = _find_sites(copied, _layers(copied.network))
        self.ranges: dict[str, Range] = {}

    def attach(self, network: nn.Module) -> None:
        """Watch `network`, of the architecture of the model; only what it computes in training mode counts."""

        def record(name: str, module: nn.Module, tensor: Tensor) -> None:
            if module.training:
                _widen(self.ranges, name, tensor)

        for name, site in self._sites.items():
            module = network.get_submodule(name)
            if site == "output":
                module.register_forward_hook(lambda module, _, output, name=name: record(name, module, output))
            else:
                module.register_forward_pre_hook(lambda module, given, name=name: record(name, module, given[0]))

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, as plain data."""
        return {name: list(ends) for name, ends in self.ranges.items()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.ranges = {name: (float(low), float(high)) for name, (low, high) in state.items()}


def _layers(network: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in network.named_modules() if isinstance(module, LAYERS)}


def _widen(ranges: dict[str, Range], name: str, tensor: Tensor) -> None:
    values = tensor.detach()
    low, high = float(values.amin()), float(values.amax())  # faster by far than aminmax, channels-last
    known = ranges.get(name, (low, high))
    ranges[name] = (min(low, known[0]), max(high, known[1]))


def _check_bits(name: str, bits: int | None) -> None:
    if bits is not None and not 1 <= bits <= MAX_BITS:
        raise ToolkitError(
            f"{name} cannot be quantised to so many bits", found=f"{bits} bits", fix=f"choose 1 to {MAX_BITS} bits"
        )


def _hook(layer: nn.Module, quantiser: _QuantiseInput) -> None:
    layer.register_forward_pre_hook(quantiser)


def _round_weights(layer: nn.Module, bits: int, per_channel: bool) -> None:
    if parametrize.is_parametrized(layer, "weight"):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    weights = cast("Tensor", layer.weight).detach()
    layer.weight = nn.Parameter(quantise_weights(weights, bits, per_channel=per_channel), requires_grad=False)


Site = Literal["pixels", "input", "output"]
"""Where a tensor is rounded: where a layer reads the normalised image or an activation, or where a ReLU makes it."""


class _Tracer:
    """Sees in one forward pass which layers read what a ReLU made, or the image, as it was.

    Tensors are recognised by their memory, so that views (flattening) count, and by their version, so that what was
    changed in place does not.
    """

    def __init__(self) -> None:
        self.made_by: dict[int, tuple[str, Tensor, int]] = {}
        self.calls: dict[str, int] = {}
        self.read: dict[str, set[str | None]] = {}

    def made(self, name: str, tensor: Tensor) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        self.made_by[_memory(tensor)] = (name, tensor, tensor._version)  # kept: its memory must not be given out again

    def reads(self, name: str, tensor: Tensor) -> None:
        maker, _, version = self.made_by.get(_memory(tensor), (None, tensor, tensor._version))
        self.read.setdefault(name, set()).add(maker if version == tensor._version else None)

    def sites(self) -> dict[str, Site]:
        """A ReLU module that is used twice makes tensors of different ranges, which are rounded where they are read."""
        once = {name for name, count in self.calls.items() if count == 1 and name}
        found: dict[str, Site] = {}
        for layer, makers in self.read.items():
            if makers == {""}:
                found[layer] = "pixels"
            elif not makers <= once:
                found[layer] = "input"
        relus = {maker for layer, makers in self.read.items() if layer not in found for maker in makers if maker}
        return {**found, **dict.fromkeys(sorted(relus), "output")}


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _find_sites(model: TorchModel, layers: Collection[str]) -> dict[str, Site]:
    """By module name, where the tensors that the layers read are rounded."""
    tracer, handles = _Tracer(), []
    network = model.network
    handles.append(network.register_forward_pre_hook(lambda _, arguments: tracer.made("", arguments[0])))
    for name, module in network.named_modules():
        if name in layers:
            handles.append(
                module.register_forward_pre_hook(lambda _, arguments, name=name: tracer.reads(name, arguments[0]))
            )
        elif type(module) in (nn.ReLU, nn.ReLU6):
            handles.append(module.register_forward_hook(lambda _, __, output, name=name: tracer.made(name, output)))
    with torch.no_grad():
        model.module(probe_images(model.spec.input_shape).to(model.module.mean.device))
    for handle in handles:
        handle.remove()
    return tracer.sites()


def _observe(model: TorchModel, sites: dict[str, Site], reader: CalibrationReader) -> dict[str, Range]:
    """Least and largest value at every site over all calibration images, in float32."""
    ranges: dict[str, Range] = {}

    def record(name: str, tensor: Tensor) -> None:
        _widen(ranges, name, tensor)

    handles = []
    for name, site in sites.items():
        module = model.network.get_submodule(name)
        if site == "output":
            handles.append(module.register_forward_hook(lambda _, __, output, name=name: record(name, output)))
        else:
            handles.append(module.register_forward_pre_hook(lambda _, arguments, name=name: record(name, arguments[0])))
    with torch.no_grad():
        for images in _batches(reader):
            model.module(images.to(model.module.mean.device))
    for handle in handles:
        handle.remove()
    bad = [name for name, ends in ranges.items() if not all(abs(end) < float("inf") for end in ends)]
    if bad:
        raise ToolkitError(
            "the network's activations are no finite numbers",
            found=f"at '{bad[0]}' on the calibration images",
            fix="the training diverged: train again with a lower --learning-rate, or take an earlier checkpoint",
        )
    return ranges


def _batches(reader: CalibrationReader) -> Iterator[Tensor]:
    for feed in iter(reader.get_next, None):
        yield torch.from_numpy(feed["image"])
