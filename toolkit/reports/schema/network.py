"""Of the network: what came in, what ships, the images, the fine-tuning."""

from __future__ import annotations

from typing import Literal

from toolkit.reports.schema.parts import Change, Part, Share


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
