"""Quantisation-aware training: the last part of a training computes on rounded weights and activations.

It may begin in float. Then fake quantisers (`fake_quantisers`) come in at the tensors that the integer graph will
quantise (`sites`), straight-through (Bengio et al. 2013; Jacob et al. 2018), and attacks are made through them. At last
the statistics of batch norms and the ranges of activations stand still, so that the weights settle on what ships. Batch
norms need no folding for that: weights are rounded with a scale per output channel, which folding multiplies like the
weights themselves, so that the integers are those of the folded graph. With one scale a tensor, which is for
simulations alone, they are those of a graph that is not folded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from toolkit.artifacts import Normalized, Split, TorchModel
from toolkit.config import HardenConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.fake_quantised import MAX_BITS
from toolkit.exporters.given_ranges import ranges_by_tensor
from toolkit.exporters.ranges import Interval
from toolkit.training import fake_quantisers
from toolkit.training.fake_quantisers import (
    INPUT,
    OUTPUT,
    WEIGHT,
    ActivationQuantiser,
    PixelQuantiser,
    Switch,
    WeightQuantiser,
    activation_quantisers,
)
from toolkit.training.sites import find_sites

MIN_BITS = 2
"""With one, nothing is left of a tensor but its sign, which needs a network of its own (binary weights)."""
SETTLED_SHARE = 0.8
"""Share of the training after which batch norms' statistics and ranges stand still."""
REFIT_EVERY = 10
"""Optimiser steps between two looks at the ranges."""
KEEP = 0.9
"""Share of the old range that such a look leaves."""
KEEP_EXTREMES = 0.8
"""The same where there is a look at every step: NNI's quantiser leaves 0.99 at each of the 21 passes of such a step."""
COMPARED_IMAGES = 4
"""Images by whose activations the tensors of a graph are recognised."""


def check_qat(config: HardenConfig) -> None:
    """Refuse what `--qat` does not go together with.

    Raises:
        ToolkitError: no integer graph, no fine-tuning, or another calibration or granularity than training has.
    """
    how, tuning = config.quantize, config.finetune
    if not how.int8:
        raise ToolkitError(
            "--qat trains for an integer graph, which is not asked for",
            found="--qat without --int8",
            fix="add --int8, or leave --qat away",
        )
    if tuning.objective == "none" or tuning.epochs == 0:
        raise ToolkitError(
            "--qat is a way of fine-tuning, and there is none",
            found=f"--finetune {tuning.objective} --epochs {tuning.epochs}",
            fix="fine-tune (--finetune adversarial --epochs 8), or leave --qat away",
        )
    if how.engine != "ort":
        raise ToolkitError(
            "the ranges that --qat learns stand in the graph that the engine ort writes",
            found=f"--qat --engine {how.engine}",
            fix="leave --engine or --qat away",
        )
    if (how.weight_bits, how.activation_bits) != (8, 8):
        raise ToolkitError(
            "--qat trains for 8 bits",
            found=f"--qat with weights of {how.weight_bits} and activations of {how.activation_bits} bits",
            fix="leave the bits at 8, or leave --qat away",
        )
    if not how.per_channel:
        raise ToolkitError(
            "--qat rounds weights with a scale for every output channel",
            found="--qat --per-tensor",
            fix="leave one of the two away",
        )
    if how.calibrate_adversarial > 0:
        raise ToolkitError(
            "--qat learns the ranges of activations, so that attacked calibration images would change nothing",
            found=f"--qat --calibrate-adversarial {how.calibrate_adversarial:g}",
            fix="leave one of the two away",
        )


@dataclass(frozen=True, slots=True)
class Rounding:
    """To what a training rounds: int8 as it ships, or fewer bits as a simulation.

    Weights are symmetric, activations asymmetric; pixels cover [-margin, 1 + margin].

    Raises:
        ToolkitError: bits out of range.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    margin: float = 0.0
    """Pixels by which attacked images may leave [0, 1]."""
    per_channel: bool = True
    """Whether weights have a scale for every output channel, as what ships; else one for all."""
    extremes: bool = False
    """Whether ranges span all values and follow them at every step, so that next to nothing is clipped; else they are
    those of least squared error, looked at every `REFIT_EVERY` steps, which leave out a few large values."""

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            bits = getattr(self, name)
            if not MIN_BITS <= bits <= MAX_BITS:
                raise ToolkitError(
                    f"a training cannot round {name.replace('_', ' ').replace(' bits', 's')} to so many bits",
                    found=f"{bits} bits",
                    fix=f"choose {MIN_BITS} to {MAX_BITS} bits",
                )

    def record(self) -> dict[str, Any]:
        """As plain data."""
        found = asdict(self)
        if not self.extremes:
            del found["extremes"]  # what was begun before there was a choice goes on
        return found


@dataclass(frozen=True)
class LearntRanges:
    """The ranges of activations that a training ended with."""

    rounding: Rounding
    ends: Mapping[str, tuple[Interval, ...]]
    """By the name of the fake quantiser: of every call of its module in one pass."""


def prepare(model: TorchModel, rounding: Rounding) -> Switch:
    """Hang fake quantisers onto the modules of `model`, in place; they round from now on.

    Returns: what turns them off and on.

    Raises:
        ToolkitError: the network cannot be prepared.
    """
    sites, switch, network = find_sites(model), Switch(extremes=rounding.extremes), model.network
    for name in sites.layers:
        layer = network.get_submodule(name)
        layer.add_module(WEIGHT, WeightQuantiser(rounding.weight_bits, switch, per_channel=rounding.per_channel))
        layer.register_forward_pre_hook(fake_quantisers.lend_weights)
        layer.register_forward_hook(fake_quantisers.take_weights_back, always_call=True)
        if name in sites.pixels:
            folds = isinstance(layer, nn.Conv2d) and layer.groups == 1
            normalization, bits = model.spec.normalization, rounding.activation_bits
            pixels = PixelQuantiser(normalization, rounding.margin, bits, folds=folds, switch=switch)
            layer.add_module(INPUT, pixels.to(model.module.mean.device))
            layer.register_forward_pre_hook(fake_quantisers.round_input)
    for kind, found in ((INPUT, sites.inputs), (OUTPUT, sites.outputs)):
        for name, calls in found.items():
            module = network.get_submodule(name)
            quantiser = ActivationQuantiser(calls, rounding.activation_bits, switch)
            module.add_module(kind, quantiser.to(model.module.mean.device))
            if kind == INPUT:
                module.register_forward_pre_hook(fake_quantisers.round_input)
            else:
                module.register_forward_hook(fake_quantisers.round_output)
    network.register_forward_pre_hook(fake_quantisers.begin_pass)
    return switch


def simulate(model: TorchModel, learnt: LearntRanges) -> TorchModel:
    """A copy of the float network `model` that rounds as it did at the end of its training; to be judged or attacked.

    Args:
        model: as the training returned it.
        learnt: what the training returned beside it.
    """
    copied = model.copy()
    prepare(copied, learnt.rounding)
    for name, quantiser in activation_quantisers(copied.network).items():
        quantiser.ends.copy_(torch.tensor(learnt.ends[name]))
    copied.module.eval().requires_grad_(False)
    return copied


def activations(model: TorchModel, rounding: Rounding, images: Tensor) -> dict[tuple[str, int], Tensor]:
    """What the float network `model` computes where a training would round, by fake quantiser and call, on the CPU."""
    copied = model.copy()
    prepare(copied, rounding).rounding = False
    seen: dict[tuple[str, int], Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            assert isinstance(module, ActivationQuantiser)
            if module.call < len(module.sites) and module.sites[module.call]:
                seen[name, module.call] = arguments[0].detach().float().cpu().clone()

        return hook

    for name, quantiser in activation_quantisers(copied.network).items():
        quantiser.register_forward_pre_hook(note(name))
    copied.predict(images)
    return seen


def graph_ranges(model: TorchModel, learnt: LearntRanges, fp32: Path, calibration: Split) -> dict[str, Interval]:
    """The learnt ranges by the names of tensors in the float twin of `model`; `Quantizer` takes them.

    Args:
        model: as the training returned it.
        learnt: what the training returned beside it.
        fp32: the float twin.
        calibration: images of which a few are looked at.
    """
    images = calibration.take(np.arange(min(COMPARED_IMAGES, len(calibration)), dtype=np.int64)).images
    ranges = {(name, call): ends for name, calls in learnt.ends.items() for call, ends in enumerate(calls)}
    return ranges_by_tensor(fp32, images, activations(model, learnt.rounding, images), ranges)


class Schedule:
    """Turns the fake quantisers of a training on and off, and its batch norms still, step by step.

    Args:
        switch: of the quantisers.
        steps: of the whole training.
        begins: share of them before rounding begins.
    """

    def __init__(self, switch: Switch, steps: int, begins: float) -> None:
        self.switch = switch
        self.first = min(math.ceil(begins * steps), steps - 1)
        """The step (counted from 0) before which rounding begins."""
        self.settled = max(math.ceil(SETTLED_SHARE * steps), self.first + 1)
        """That from which on ranges and statistics stand still."""
        switch.rounding = False

    def begin(self, module: Normalized, images: Tensor, copies: Sequence[Normalized]) -> None:
        """Fit the ranges to what some images, clean and attacked, cause in the float network.

        Args:
            module: in training; it is left in evaluation mode.
            images: float32 [n, C, H, W], on its device.
            copies: networks like it that are to have the same ranges.
        """
        module.eval()
        with torch.no_grad():
            fit(module.network, self.switch, lambda: module(images))
        fitted = activation_quantisers(module.network)
        for copied in copies:
            for name, quantiser in activation_quantisers(copied.network).items():
                quantiser.ends.copy_(fitted[name].ends)

    def enter(self, step: int, module: nn.Module) -> None:
        """Before step number `step`, counted from 0; batch norms of `module`, in training mode, stand still in time."""
        self.switch.rounding = step >= self.first
        every, keep = (1, KEEP_EXTREMES) if self.switch.extremes else (REFIT_EVERY, KEEP)
        looks = self.first <= step < self.settled and (step - self.first) % every == 0
        self.switch.keep = keep if looks else None
        if step >= self.settled:
            for inner in module.modules():
                if isinstance(inner, _BatchNorm):
                    inner.eval()

    def leave(self) -> None:
        """After a step: nothing learns ranges until the next."""
        self.switch.keep = None

    def counts(self, step: int) -> bool:
        """Whether the network after `step` steps is one that has learnt to be rounded."""
        return step > self.first


def fit(network: nn.Module, switch: Switch, run: Callable[[], object]) -> None:
    """Fit all ranges anew to what `run` lets the network compute, in float and in the mode that it is in."""
    quantisers = activation_quantisers(network).values()
    modes = [quantiser.training for quantiser in quantisers]
    before, switch.rounding, switch.keep = (switch.rounding, switch.keep), False, 0.0
    for quantiser in quantisers:
        quantiser.train()
    try:
        run()
    finally:
        switch.rounding, switch.keep = before
        for quantiser, mode in zip(quantisers, modes, strict=True):
            quantiser.train(mode)


def split_state(state: Mapping[str, Tensor], rounding: Rounding) -> tuple[dict[str, Tensor], LearntRanges]:
    """The weights of the network in a prepared network's state, and its ranges."""
    suffixes = tuple(f"{kind}.ends" for kind in (INPUT, OUTPUT))
    ends = {name.removesuffix(".ends"): value for name, value in state.items() if name.endswith(suffixes)}
    weights = {name: value for name, value in state.items() if not name.endswith(suffixes)}
    pairs = {name: tuple((float(low), float(high)) for low, high in value) for name, value in ends.items()}
    return weights, LearntRanges(rounding, pairs)
