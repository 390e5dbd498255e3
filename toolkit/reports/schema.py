"""The report of a bundle as types; its JSON Schema in docs/ is generated from them."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from toolkit.artifacts import Proportion
from toolkit.statistics import Mcnemar

SCHEMA_VERSION: Literal["1.1"] = "1.1"

SurrogateName = Literal["original", "float", "fake_quantised", "twin"]
TargetName = Literal["torch", "fp32", "deployed", "deployed_unoptimised"]


class Part(BaseModel):
    """Base of all parts: unknown fields are errors, so that the schema says everything."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Share(Part):
    """A share of images with its 95 % Wilson interval."""

    correct: int = Field(ge=0)
    total: int = Field(ge=1)
    value: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)

    @classmethod
    def of(cls, proportion: Proportion) -> Share:
        """The same share as a part of a report."""
        return cls.model_validate(proportion.as_dict())


class Change(Part):
    """A quantity of the network that came in, and of what ships."""

    before: int
    after: int


class Layer(Part):
    """One layer with weights before and after pruning; MACs are of one image."""

    name: str
    filters: Change
    parameters: Change
    macs: Change


class RoundingRecord(Part):
    """Widths rounded to one multiple: what such a network costs, as the graph that ships."""

    round_to: int
    macs: int
    ratio: float
    """Time over that of widths that are not rounded; geometric mean over the batch sizes."""
    ratio_low: float
    ratio_high: float
    float_ratio: float
    """The same of the float graphs."""
    per_mac: float
    """Time per multiply-accumulate over that of the best candidate."""
    graph: str
    admitted: bool
    """Its multiply-accumulates are near enough to those asked for, or it is wider for nothing."""
    chosen: bool


class Model(Part):
    """The network: what it is, and what pruning and quantisation made of it."""

    architecture: str
    class_names: list[str]
    input_shape: list[int]
    mean: list[float]
    std: list[float]
    params: Change
    macs: Change
    bytes: Change
    """Size of the original network's float ONNX file, and of model.onnx."""
    prune_ratio: float
    prune_scope: str
    round_to: int
    prune_importance: str = "l1"
    prune_ratios: dict[str, float] = {}
    """Of single layers, by name, where they differ from `prune_ratio`."""
    layers: list[Layer]
    roundings: list[RoundingRecord] = []
    """What `--round-to auto` tried; empty where it was not asked for."""
    roundings_foreign_load: float | None = None
    """Share of the CPU time that other processes took while these were timed."""


class SplitRecord(Part):
    """Number of images and the digest of the set."""

    images: int
    sha256: str


class Data(Part):
    """Images and what they served for; the four parts are disjoint."""

    source: str
    train: SplitRecord
    calibration: SplitRecord
    validation: SplitRecord
    evaluation: SplitRecord
    dropped_duplicates: int
    evaluation_choice: str
    incoming_training: Literal["known", "unknown"]
    """Whether the network came with the hashes of the images that it was trained on; only then is that proved too."""


class Threat(Part):
    """What the attacker may do; eps in pixels, or behind the normalisation."""

    preset: str
    norm: Literal["linf", "l2", "l1"]
    eps: float
    space: Literal["pixels", "normalised"]
    clip: bool


class Epoch(Part):
    """One epoch of fine-tuning on the validation part."""

    epoch: int
    loss: float
    accuracy: Share
    robust: Share | None


class Finetuning(Part):
    """Training after pruning."""

    objective: str
    epochs: list[Epoch]
    best_epoch: int
    precision: str
    qat: bool = False
    """Whether its last part computed on rounded weights and activations."""
    qat_from: float | None = None
    """Share of the training before that part."""


class Accuracy(Part):
    """Clean accuracy of the same network in three forms, on the same images."""

    torch: Share
    fp32: Share
    deployed: Share


class Baseline(Part):
    """The network that came in, attacked in the same way on the first evaluation images."""

    accuracy: Share
    robust_accuracy: Share


class Attack(Part):
    """One attack made on a surrogate and scored on a target, all steps on all images."""

    attack: str
    threat: Threat
    steps: int
    step_size: float
    restarts: int
    random_start: bool
    surrogate: SurrogateName
    target: TargetName
    correct: int
    total: int
    value: float
    low: float
    high: float
    transfer_rate: float | None
    """Of the images clean-correct on both and fooled on the surrogate, the share that fools the target too."""
    transfer_n: int
    valid: bool
    """False where the surrogate is a twin that is not faithful."""


class ColumnTest(Part):
    """McNemar's exact test between two targets under one attack on the same images."""

    attack: str
    surrogate: SurrogateName
    first: TargetName
    second: TargetName
    only_first: int
    """Images on which only the first is right."""
    only_second: int
    p_value: float


class RobustAccuracy(Part):
    """Worst case per image over clean and all attacks, the same attacked images for all."""

    fp32: Share
    deployed: Share
    deployed_from_file: Share | None
    """Of the deployed graph when it reads the attacked images from 8-bit PNG files."""


class PassRecord(Part):
    """One attack of the worst case, made for a graph, or several, on the images that still stood."""

    attack: str
    steps: int
    """Gradients, or queries, per image, and of each rank or start."""
    ranks: list[int]
    """Of a targeted attack: towards the image's so-many-th likeliest other classes."""
    surrogate: SurrogateName | None
    """None: by queries, on the graph itself."""
    graphs: list[TargetName]
    """For which it was made."""
    attempted: int
    """Images it was made on: those that still stood on one of these, and were near enough to its boundary."""
    fooled: int
    """Of these, images that fool the first of the graphs now, and did not before."""
    onward: bool = False
    """From around where the attacks before it were stuck."""
    starts: int = 1
    """Random starts, side by side."""


class WorstCase(Part):
    """What lies behind the worst case, beside the transfer matrix."""

    attacks: str
    """As the user asked for them."""
    passes: list[PassRecord]
    complete: bool
    not_run: list[str]
    """What the time did not suffice for, or what had no network; the worst case is then that of what was run."""


class AlarmRecord(Part):
    """A reason to doubt a robustness figure."""

    name: str
    message: str
    value: float
    limit: float


class CheckRecord(Part):
    """A way in which a figure could be wrong, measured; an alarm if the value is above the limit."""

    name: str
    value: float
    limit: float
    alarm: bool


class FidelityRecord(Part):
    """The twin of the deployed graph against the session that runs it."""

    agreement_clean: Share
    agreement_attacked: Share | None
    max_difference: float
    relative: float
    """Largest logit difference over the standard deviation of the session's logits."""
    valid: bool
    """Whether figures that rest on the twin count."""


class SaturationRecord(Part):
    """Share of a quantised tensor's values outside of what its quantiser represents."""

    tensor: str
    clean: float
    attacked: float


class CurvePoint(Part):
    """Accuracy of the graph that counts under PGD of one radius and number of steps; eps 0 is clean."""

    eps: float
    steps: int
    correct: int
    total: int
    value: float
    low: float
    high: float


class Robustness(Part):
    """The evidence of robustness, of a bundle or of any graph that was attacked."""

    robustness: list[Attack]
    columns: list[ColumnTest]
    worst_case: WorstCase
    soundness: list[AlarmRecord]
    soundness_checks: list[CheckRecord]
    fidelity: FidelityRecord | None
    saturation: list[SaturationRecord]
    security_curve: list[CurvePoint]
    """Over the radius, by the surrogate that transfers best; empty where no gradients are to be had."""
    step_ladder: list[CurvePoint]
    """The same over the number of steps."""


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


class Gate(Part):
    """A limit that the user set, and what was measured."""

    name: str
    limit: float
    value: float
    met: bool


class AttackReport(Robustness):
    """What `toolkit attack` found."""

    target: str
    """The file's or folder's name."""
    data: str
    images: int
    threat: Threat
    steps: int
    step_size: float
    restarts: int
    random_start: bool
    seed: int
    budget: float | None
    """Seconds that were set; such a run need not be repeatable."""
    seconds: float
    accuracy: dict[str, Share]
    robust_accuracy: dict[str, Share]
    """By graph, and `deployed_from_file`: the graph that counts, reading attacked images from 8-bit PNG files."""
    clipped_share: float | None
    environment: dict[str, Any]


class Report(Robustness):
    """Everything that is claimed of a bundle."""

    schema_version: Literal["1.1"]
    toolkit_version: str
    seed: int
    model: Model
    data: Data
    threat: Threat
    finetuning: Finetuning
    baseline: Baseline
    accuracy: Accuracy
    robust_accuracy: RobustAccuracy
    parity: list[ParityRecord]
    end_to_end: EndToEnd | None
    quantization: Quantization
    targets: list[TargetFile] = []
    latency: list[Latency]
    gates: list[Gate]
    environment: dict[str, Any]
    timings: dict[str, float]
    """Seconds of every stage."""


def schema_text() -> str:
    """The JSON Schema of `Report` as it stands in docs/report.schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
