"""Fake quantisers that a network bears while it is trained: of weights, pixels, and activations whose ranges learn.

They hang on the network's own modules as children and hooks, so that the network stays what it is: its weights are
trained, averaged and saved in float under their own names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolkit.artifacts import Normalization
from toolkit.evaluators.rounding import Grid, activation_grid, pixel_grid, quantise_weights, round_to
from toolkit.exporters.input_range import folding_grid

INPUT, OUTPUT, WEIGHT = "fake_quantised_input", "fake_quantised_output", "fake_quantised_weight"
"""Names of the children by which a module's first argument, its result and its weights are rounded."""
SAMPLE = 8192
"""Values from which a range is fitted."""
SHARES = torch.from_numpy(np.geomspace(0.1, 1.0, 33)).float()
"""Of each end, what is tried."""
SWEEPS = 2
"""How often the two ends are chosen in turn."""
FOLDED_BITS = 8
"""So many bits the integer graph's folded input quantiser has."""


@dataclass
class Switch:
    """What the fake quantisers do; a network, its copies and its average share one."""

    rounding: bool = True
    """Whether they round; if not, the network computes in float."""
    keep: float | None = None
    """Share of the old range that one batch in training mode leaves: 0 fits ranges anew; None leaves them alone."""
    extremes: bool = False
    """Whether a range spans all values, rather than that which rounds and clips them with the least error."""

    def __deepcopy__(self, _: dict[int, Any]) -> Switch:
        return self


class ActivationQuantiser(nn.Module):
    """Rounds what a module reads or gives to a grid over a range of its own for every call within one forward pass.

    Args:
        sites: for every call of the module in one pass, whether it is rounded there.
        bits: of the grid.
        switch: shared by all.
    """

    ends: Tensor

    def __init__(self, sites: Sequence[bool], bits: int, switch: Switch) -> None:
        super().__init__()
        self.sites, self.bits, self.switch = tuple(sites), bits, switch
        self.register_buffer("ends", torch.tensor([[-1.0, 1.0]] * len(self.sites)))
        self.call = 0
        """How often the module was called in this pass; `begin_pass` sets it back."""

    def forward(self, values: Tensor) -> Tensor:
        call = self.call
        self.call += 1
        if call >= len(self.sites) or not self.sites[call]:
            return values
        switch = self.switch
        if switch.keep is not None and self.training:
            ends = span(values) if switch.extremes else fit_range(values, self.bits)
            fitted = torch.tensor(ends, device=self.ends.device)
            self.ends[call] = torch.lerp(fitted, self.ends[call], switch.keep)
        if not switch.rounding:
            return values
        low, high = self.ends[call].tolist()
        return round_to(values, activation_grid(low, high, self.bits))


class PixelQuantiser(nn.Module):
    """Rounds the normalised image to the grid that the integer graph's input quantiser will have.

    Args:
        normalization: in front of the network.
        margin: pixels by which attacked images may leave [0, 1].
        bits: of the grid.
        folds: whether the integer graph folds the normalisation into the quantiser, if there is a grid for that.
        switch: shared by all.
    """

    unit: Tensor

    def __init__(self, normalization: Normalization, margin: float, bits: int, *, folds: bool, switch: Switch) -> None:
        super().__init__()
        self.switch, self.grid = switch, pixel_grid(normalization, margin, bits)
        unit = np.ones(1)
        mean, std = np.array(normalization.mean), np.array(normalization.std)
        found = folding_grid(mean, margin) if folds and bits == FOLDED_BITS else None
        if found is not None:
            folded, mean_steps = found
            unit, lowest = folded.step / std, -folded.zero_point - mean_steps
            self.grid = Grid(1.0, lowest, lowest + 2**bits - 1)
        self.register_buffer("unit", torch.from_numpy(unit).float().view(1, -1, 1, 1), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        return round_to(values / self.unit, self.grid) * self.unit if self.switch.rounding else values


class WeightQuantiser(nn.Module):
    """Gives a layer rounded weights for the time of its forward pass; the gradient goes to the float ones unchanged.

    Args:
        bits: of the symmetric grid.
        switch: shared by all.
        per_channel: whether every output channel has a scale of its own.
    """

    def __init__(self, bits: int, switch: Switch, *, per_channel: bool = True) -> None:
        super().__init__()
        self.bits, self.switch, self.per_channel = bits, switch, per_channel
        self._taken: nn.Parameter | None = None
        self._kept: tuple[int, Tensor] | None = None

    def lend(self, layer: nn.Module) -> None:
        """Put the rounded weights in the place of the layer's own."""
        if not self.switch.rounding:
            return
        weight = layer._parameters["weight"]
        assert weight is not None
        self._taken = weight
        layer._parameters["weight"] = self._rounded(weight)  # type: ignore[assignment]

    def take_back(self, layer: nn.Module) -> None:
        """Put the layer's own weights back."""
        if self._taken is not None:
            layer._parameters["weight"] = self._taken
            self._taken = None

    def _rounded(self, weight: nn.Parameter) -> Tensor:
        """Of frozen weights, as in an attack's copy of the network, once for all steps of the attack."""
        if weight.requires_grad:
            return weight + (self._quantised(weight) - weight.detach())
        if self._kept is None or self._kept[0] != weight._version or torch.is_inference_mode_enabled():
            rounded = self._quantised(weight)
            if torch.is_inference_mode_enabled():  # no attack could use it
                return rounded
            self._kept = (weight._version, rounded)
        return self._kept[1]

    def _quantised(self, weight: nn.Parameter) -> Tensor:
        return quantise_weights(weight.detach(), self.bits, per_channel=self.per_channel)


def span(values: Tensor) -> tuple[float, float]:
    """The least and the largest of `values`, of any shape, and 0."""
    low, high = (float(end) for end in values.detach().float().aminmax())
    return min(low, 0.0), max(high, 0.0)


def fit_range(values: Tensor, bits: int) -> tuple[float, float]:
    """The ends of the range whose grid rounds and clips `values` with the least mean squared error; 0 lies within.

    Args:
        values: of any shape; what is compared is a sample of `SAMPLE`, evenly spread.
        bits: of the grid.
    """
    low, high = span(values)
    flat = values.detach().flatten()
    sample = flat[:: max(1, flat.numel() // SAMPLE) | 1].float()
    shares = SHARES.to(sample.device)
    for _ in range(SWEEPS if low < 0 < high else 1):
        if high > 0:
            high = float(_best(sample, torch.full_like(shares, low), high * shares, bits)[1])
        if low < 0:
            low = float(_best(sample, low * shares, torch.full_like(shares, high), bits)[0])
    return low, high


def _best(sample: Tensor, lows: Tensor, highs: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    levels = 2**bits - 1
    step = ((highs - lows) / levels)[:, None]
    zero_point = (-lows[:, None] / step).round()
    rounded = ((sample / step).round() + zero_point).clamp(0, levels).sub(zero_point).mul(step)
    best = (rounded - sample).square().mean(dim=1).argmin()
    return lows[best], highs[best]


def round_input(module: nn.Module, layer_is_called_with: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook."""
    first, *others = layer_is_called_with
    return (module.get_submodule(INPUT)(first), *others)


def round_output(module: nn.Module, _: tuple[Any, ...], result: Tensor) -> Tensor:
    """Forward hook."""
    rounded: Tensor = module.get_submodule(OUTPUT)(result)
    return rounded


def lend_weights(module: nn.Module, _: tuple[Any, ...]) -> None:
    """Forward pre-hook."""
    quantiser = module.get_submodule(WEIGHT)
    assert isinstance(quantiser, WeightQuantiser)
    quantiser.lend(module)


def take_weights_back(module: nn.Module, _: tuple[Any, ...], __: object) -> None:
    """Forward hook, called after errors too."""
    quantiser = module.get_submodule(WEIGHT)
    assert isinstance(quantiser, WeightQuantiser)
    quantiser.take_back(module)


def begin_pass(network: nn.Module, _: tuple[Any, ...]) -> None:
    """Forward pre-hook of the whole network: the calls of every module are counted from 0."""
    for quantiser in activation_quantisers(network).values():
        quantiser.call = 0


def activation_quantisers(network: nn.Module) -> dict[str, ActivationQuantiser]:
    """All of them by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, ActivationQuantiser)}
