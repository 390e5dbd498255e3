"""One configuration per stage of the pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from toolkit.config.base import CalibrationSetting, Epsilon, Fraction, Multiple, PrecisionChoice, Share, StageConfig

MOST_MEAN = 10.0
"""Of pixels in [0, 1] no mean is farther out; one for pixels from 0 to 255 is, even that of dark images."""


class DataConfig(StageConfig):
    """Where images come from and how many serve which purpose."""

    source: str | None = None
    """`sample`, `fashion-mnist`, `cifar10`, `folder:DIR`, `npz:FILE`; None: the checkpoint's own data set."""
    data_dir: Path | None = None
    download: bool = False
    size: Annotated[int, Field(ge=4)] | None = None
    calibration: Annotated[int, Field(ge=1)] = 500
    evaluation: Annotated[int, Field(ge=1)] | None = None
    """Number of evaluation images; None: all."""

    @field_validator("source")
    @classmethod
    def _find_home(cls, source: str | None) -> str | None:
        kind, _, place = (source or "").partition(":")  # a shell leaves the ~ of folder:~/images alone
        return f"{kind}:{Path(place).expanduser()}" if place.startswith("~") else source


class ThreatConfig(StageConfig):
    """Threat model and PGD schedule; what is None is filled in from the preset of the data set."""

    preset: Literal["pixel", "paper"] = "pixel"
    norm: Literal["linf", "l2", "l1"] = "linf"
    eps: Epsilon | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    step_size: Epsilon | None = None
    random_start: bool | None = None
    restarts: Annotated[int, Field(ge=1)] = 1


class PruneConfig(StageConfig):
    """Structured filter pruning."""

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    scope: Literal["layer", "global"] = "layer"
    round_to: Multiple = 8
    """Widths are rounded to the nearest multiple of this; 8 keeps the integer kernels' columns full. 1: no rounding.
    `auto`: the multiple with which this machine takes least time per multiply-accumulate, found by measuring."""
    importance: Literal["l1", "l2", "geometric-median"] = "l1"
    """Which filters go: those of least norm, or those that the others of their layer can best stand in for."""
    ratios: Mapping[str, Annotated[float, Field(ge=0, lt=1)]] = {}
    """Shares of single layers, by module name; layers that can only be pruned together follow the one named."""

    @property
    def prunes(self) -> bool:
        """Whether any filter is to go."""
        return self.ratio > 0 or any(share > 0 for share in self.ratios.values())

    @property
    def multiple(self) -> int:
        """The multiple, once it is known.

        Raises:
            ValueError: it is still `auto`.
        """
        if self.round_to == "auto":
            raise ValueError("no multiple is chosen")
        return self.round_to


class TrainConfig(StageConfig):
    """Training from scratch and fine-tuning."""

    objective: Literal["adversarial", "fgsm", "trades", "distill", "standard", "none"] = "adversarial"
    epochs: Annotated[int, Field(ge=0)] = 24
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images of an optimiser step, over all processes."""
    accumulate: Annotated[int, Field(ge=1)] = 1
    """Parts in which a step's images (of this process) go through the network, to save memory; gradients are summed."""
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    schedule: Literal["one-cycle", "stepped", "constant"] = "one-cycle"
    """`one-cycle`: linear warm-up to the rate, then linear to 0. `stepped`: the paper's, a tenth after epoch 4."""
    attack_steps: Annotated[int, Field(ge=1)] | None = None
    """PGD steps, of `fgsm` those after a collapse. None: 2 of `adversarial` and `distill`, 7 of `fgsm` and `trades`."""
    attack_schedule: Literal["crossing", "threat"] = "crossing"
    """`crossing`: steps that together cross the ball 2.5 times, from a random start. `threat`: as the threat model's
    preset measures, with its step size, start and, unless `attack_steps` is set, steps."""
    radius: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Of the attack in training, in units of the threat model's radius; above 1 trades clean for robust accuracy."""
    clean_share: Share | None = None
    """Share of the loss on clean images, of `adversarial`, `fgsm` and `distill`; None: 1/6 of `distill`, else 0."""
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 6.0
    """Weight of the divergence of `trades`."""
    teacher: Path | None = None
    """Checkpoint whose soft labels `distill` learns."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """By which `distill` divides logits."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the exponential moving average of the weights, which is shipped in their place; 0: none."""
    keep: Literal["best", "last"] = "best"
    """`best`: the last epoch that validation cannot tell from the best; `last`: the last."""
    precision: PrecisionChoice = "auto"
    qat: bool = False
    """Whether, in `harden`, the last part of the training computes on rounded weights and activations."""
    qat_from: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """With `qat`: share of the training before it rounds; 0: it rounds from its first step on."""
    augment: bool = False
    """Random horizontal flips and shifts of up to an eighth of the side."""


class ExportConfig(StageConfig):
    """ONNX export."""

    opset: Annotated[int, Field(ge=18, le=23)] = 20
    end_to_end: bool = True


class QuantizeConfig(StageConfig):
    """Static integer quantisation: int8 symmetric weights, uint8 asymmetric activations."""

    int8: bool = False
    engine: Literal["ort", "inc"] = "ort"
    """What calibrates and rounds: ONNX Runtime's tools on the float twin, Intel Neural Compressor on the network."""
    precision: Literal["int8", "auto"] = "auto"
    """`int8`: every layer but `keep_float`; `auto`, in `harden`: the fastest assignment within `max_drop`, found by
    measuring."""
    max_drop: Share = 0.005
    """What `auto` may lose in clean and in robust accuracy against the float twin, on validation images."""
    calibrate: CalibrationSetting = "minmax"
    """`auto`: the method that loses least on validation images."""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    per_channel: bool = True
    equalize: bool = True
    """Channels between two layers are scaled so that one step suits them all; the engine ort with `per_channel`,
    and not with learnt ranges."""
    reduce_range: bool | None = None
    """Weights of seven bits, which no pair of products overflows 16 bits with: for x86 without VNNI. None: if this
    machine is one."""
    keep_float: tuple[str, ...] = ()
    """Layers that are not quantised, by their nodes' names in the float twin; `*` stands for anything."""
    keep_float_here: tuple[str, ...] = ()
    """More of them, which are float for speed alone, as `auto` found on the machine where it measured: model.onnx has
    them in float, files for other runtimes have not. No flag sets it, and `auto` begins without."""
    activation_bits: int = 8
    """8, or 16, which ONNX Runtime stores and then computes in float."""
    weight_bits: int = 8
    """8, or 4: of the linear layers; ONNX Runtime has no convolution that multiplies int4."""
    targets: tuple[str, ...] = ()
    """Other runtimes for which a file of its own is written beside model.onnx: `tensorrt`, `cuda`."""
    calibrate_adversarial: Share = 0.0
    """Share of the calibration images that is attacked first, by the run's PGD on the float network."""

    @property
    def int8_bits(self) -> int:
        """Bits that int8 weights use of their eight."""
        return 7 if self.reduce_range else 8

    @property
    def searches(self) -> bool:
        """Whether `harden` looks for the fastest layers; no choice of them makes 16-bit activations run in integers."""
        return self.precision == "auto" and self.activation_bits == 8


class BenchmarkConfig(StageConfig):
    """Latency measurement with ONNX Runtime."""

    provider: Literal["cpu", "cuda"] = "cpu"
    batches: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 64)
    threads: Annotated[int, Field(ge=1)] | None = None
    rounds: Annotated[int, Field(ge=3)] = 30
    """Number of interleaved rounds; each gives one sample per file."""


class AttackConfig(StageConfig):
    """Which attacks make up the worst case."""

    attacks: str = "fast"
    """`fast`, `ensemble`, `pgd` (the transfer matrix alone), or attacks by name with commas between."""


class GateConfig(StageConfig):
    """Lower limits that a user sets on the deployed graph; unmet ones end `harden` with exit code 3."""

    min_accuracy: Share | None = None
    min_robust: Share | None = None
    min_integer_coverage: Share | None = None


class ModelConfig(StageConfig):
    """Which network, and how to read its file."""

    path: Path
    """A checkpoint, state dict or pickled module; `shipped:NAME` is one that comes with the package."""
    arch: str | None = None
    trust_pickle: bool = False
    mean: tuple[Annotated[Fraction, Field(allow_inf_nan=False)], ...] | None = None
    """Per-channel mean of the input that a bare state dict was trained on, in pixels [0, 1]; None: the data set's.
    Of an ONNX file to be attacked: what is done to the pixels before it gets them; None: nothing."""
    std: tuple[Epsilon, ...] | None = None

    @field_validator("mean")
    @classmethod
    def _check_mean(cls, mean: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if mean is not None and max(map(abs, mean), default=0.0) > MOST_MEAN:
            raise ValueError("means are of pixels in [0, 1]: divide what is for 0 to 255 by 255, and --std as well")
        return mean
