"""Of the files: parity, integer kernels, quantisation, other machines, latency."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from toolkit.reports.schema.parts import Part, Share
from toolkit.statistics import Mcnemar


class ParityRecord(Part):
    """Logits of a graph against those of the torch network at one batch size, on real images."""

    graph: Literal["fp32", "deployed"]
    batch_size: int
    max_difference: float
    relative: float
    """Largest logit difference over the standard deviation of the reference logits."""
    agreement: Share


class EndToEnd(Part):
    """model.e2e.onnx against torchvision's preprocessing and the deployed graph, on image files."""

    files: int
    max_difference: float
    """Largest difference of a probability."""
    agreement: Share
    lossless_difference: float
    """The same with the pixels handed over as PNG: decoders of JPEG differ among themselves."""
    lossless_agreement: Share


class KernelRow(Part):
    """The kernel that runs a layer in the graph after ONNX Runtime's optimisation."""

    layer: str
    kernel: str
    domain: str
    macs: int
    integer: bool


class IslandRecord(Part):
    """Float kernels of one operator in the optimised graph."""

    operator: str
    count: int
    time_share: float


class KernelTime(Part):
    """Where the time goes, measured at batch 1; differs from run to run."""

    integer_share: float
    microseconds: dict[str, float] = {}
    """By layer: of its kernel, for one image, median; without those of which no kernel is known."""
    float_islands: list[IslandRecord]


class PairedTest(Part):
    """McNemar's exact test of two graphs on the same images."""

    only_first: int = Field(ge=0)
    """Images that the first graph alone classifies rightly."""
    only_second: int = Field(ge=0)
    p_value: float = Field(ge=0, le=1)

    @classmethod
    def of(cls, test: Mcnemar) -> PairedTest:
        """The same test as a part of a report."""
        return cls.model_validate(test.as_dict())


class CalibrationSide(Part):
    """A graph calibrated in one of two ways, on validation images."""

    accuracy: Share
    robust_accuracy: Share
    """Right when clean and under the attack."""
    clipped_clean: float | None
    """Share of activations that quantisers clip, mean over the quantised tensors; null: not counted."""
    clipped_attacked: float | None


class CalibrationComparison(Part):
    """What a share of attacked calibration images did; the attack is made on the float network."""

    share: float = Field(gt=0, le=1)
    """Of the calibration images, asked for."""
    adversarial_images: int
    attack: str
    adversarial: CalibrationSide
    """With attacked images: the graph that ships."""
    plain: CalibrationSide
    """Without."""
    accuracy_test: PairedTest
    """First: with attacked images; second: without."""
    robust_test: PairedTest
    verdict: Literal["helps", "hurts", "trades", "no_difference"]
    """Of both tests at the 5 % level; `trades`: better in one and worse in the other."""


class CalibrationMethod(Part):
    """One calibration method that `--calibrate auto` tried, all layers integer, against the float twin."""

    method: str
    accuracy_drop: float
    """Clean accuracy lost on validation images; negative: gained."""
    robust_drop: float | None
    """The same in the worst case over the run's PGD, made on the float network, and attacks that go on from there
    on each graph's own form: short ones, and where these find no more than is allowed, long ones."""
    logit_error: float
    """Mean squared difference of the clean logits."""
    images: int


class Assigned(Part):
    """One choice of the layers that are integer, against the float twin."""

    ratio: float
    """Time over that of the float twin, geometric mean over the batch sizes."""
    ratio_low: float
    ratio_high: float
    accuracy_drop: float
    """Clean accuracy lost on validation images; negative: gained."""
    robust_drop: float | None
    """The same in the worst case over the run's PGD, made on the float network, and attacks that go on from there
    on each graph's own form: short ones, and where these find no more than is allowed, long ones."""


class Sensitivity(Part):
    """What the rounding of one layer does."""

    layer: str
    relief: float
    """Share of the mean squared error that is gone with this layer alone in float; may be negative. Of the margins,
    label against runner-up, of attacked images next to the boundary, or, where `margin_images` is 0, of logits."""
    accuracy_drop: float | None
    """Clean accuracy lost on validation images with it alone in integers; null: not measured, for want of time."""
    robust_drop: float | None
    """The same in the worst case, as in `Assigned`."""


class Assignment(Part):
    """Which layers are integer, found by timing whole graphs on this machine; differs from run to run."""

    keep_float: list[str]
    """Names, in model.fp32.onnx, of the layers that the search left float."""
    for_accuracy: list[str]
    """Of these, those that accuracy asks for; the others are float because that is faster, and for that alone."""
    max_drop: float
    images: int
    """Validation images on which accuracy was compared."""
    tried: int
    """Choices that were written, and timed or judged."""
    foreign_load: float = 0.0
    """Share of the CPU time that other processes took while graphs were timed."""
    sensitivity: list[Sensitivity] = []
    """Of every layer that could be integer, in the order of the graph."""
    margin_images: int = 0
    """Attacked validation images next to the float twin's boundary on whose margins `sensitivity` looks."""
    shipped: Assigned
    all_integer: Assigned
    pays: bool
    """Whether the choice is faster than the float twin beyond doubt."""


class ProviderCoverage(Part):
    """How much of the deployed graph runs in integers on one provider."""

    provider: str
    integer_coverage: float | None
    """null: not run there."""
    untested: str | None
    """Why."""


class TargetFile(Part):
    """A file for another runtime than the one that runs model.onnx (`--target`)."""

    file: str
    target: Literal["tensorrt", "cuda"]
    precision: str
    bytes: int
    accuracy: Share
    """Clean, by ONNX Runtime on the CPU."""
    robust_accuracy: Share | None
    """Right when clean and under the run's PGD, on the first evaluation images; null: there is no network to attack."""
    attacked_on: list[str]
    """The networks on which that attack was made; the worst counts, per image."""
    agreement: Share
    """Same label as the float twin, on the CPU."""
    relative: float
    """Largest logit difference over the standard deviation of the float twin's logits, on the CPU."""
    integer_coverage: float
    """On the CPU, where the file is only checked."""
    largest_activation: float | None
    """Of float16, whose largest number is 65,504: the largest magnitude on calibration images."""
    tested_on: list[str]
    untested: dict[str, str]
    """The provider that it is for, if it was not run there, and why."""


class ElsewhereRow(Part):
    """The deployed graph in another setting, against itself on the machine's CPU, on the same images."""

    setting: Literal[
        "unoptimised",
        "without_vnni",
        "with_vnni",
        "opset",
        "reduce_range",
        "reduce_range_without_vnni",
        "s8s8",
        "float_bias",
    ]
    """The first four: the very graph that ships. `without_vnni` and, told where this machine has none, `with_vnni`:
    emulated. The others: the graph written anew."""
    opset: int | None
    changed: Share | None
    """Labels of clean images that change; null: not measured, `note` says why."""
    changed_attacked: Share | None
    """Of images attacked on the float network."""
    max_difference: float | None
    """Of a logit."""
    accuracy: Share | None
    robust_accuracy: Share | None
    """Right clean and under that attack."""
    integer_coverage: float | None
    """In the graph after optimisation, where it is another graph."""
    overflows: int | None
    """Of 16-bit sums of two products, on all images, where they are emulated."""
    warning: bool
    note: str


class LayerOverflow(Part):
    """16-bit sums of two products in one layer, on all images."""

    layer: str
    operator: str
    pairs: int
    overflows: int
    share: float = Field(ge=0, le=1)


class SparedLayer(Part):
    """A layer that no saturating kernel runs, or that is not emulated."""

    layer: str
    reason: str


class Portability(Part):
    """What the deployed graph would answer elsewhere."""

    images: int
    attacked: int
    accuracy: Share
    """Of the deployed graph here, on these images."""
    robust_accuracy: Share | None
    rows: list[ElsewhereRow]
    layers: list[LayerOverflow]
    """On x86 without VNNI."""
    spared: list[SparedLayer]
    twin_agreement: Share | None
    """Images with the same label by the emulation with exact sums and by the session here."""
    saturates_here: bool
    """Whether the machine of the report is one without VNNI itself."""


class Quantization(Part):
    """What of the deployed graph runs in integers, and how it came about."""

    engine: Literal["onnxruntime", "neural-compressor", "none"]
    weights: str
    activations: str
    calibration: str | None
    calibration_images: int
    learnt_ranges: int = 0
    """Tensors whose ranges were learnt in a quantisation-aware fine-tuning; calibration set those of the others."""
    equalized: int = 0
    """Pairs of layers between which channels were scaled, so that one step of the activations suits them all."""
    input_range: list[float] | None
    """Pixels that the input quantiser represents."""
    clipped_share: float | None
    """Share of attacked pixels outside that range."""
    calibration_comparison: CalibrationComparison | None = None
    """Where attacked calibration images were asked for."""
    calibration_methods: list[CalibrationMethod] = []
    """Where `--calibrate auto` searched; `calibration` is the one taken."""
    assignment: Assignment | None = None
    """Where `--precision auto` searched."""
    coverage: list[ProviderCoverage] = []
    """The integer coverage on every provider, measured where it ran here."""
    elsewhere: Portability | None = None
    """What changes on other machines and under other settings."""
    constant_channels: dict[str, int] = {}
    """By layer: channels of what it reads that are constant on the calibration images."""
    integer_coverage: float = Field(ge=0, le=1)
    macs_integer: int
    macs_total: int
    provider: str
    layers: list[KernelRow]
    leftovers: dict[str, int]
    kernel_time: KernelTime
    verdict: str


class Latency(Part):
    """One file at one batch size; times in milliseconds per call, `ratio` = time(file) / time(float twin)."""

    file: str
    provider: str
    batch: int
    threads: int
    p50: float
    p90: float
    p99: float
    throughput: float
    runs: int
    rounds: int
    baseline: str
    ratio: float
    ratio_low: float
    ratio_high: float
    speedup: float
    speedup_low: float
    speedup_high: float
    foreign_load: float
    """Share of the CPU time that other processes took meanwhile."""
    isolation: str
