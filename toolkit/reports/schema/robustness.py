"""Of the attacks: threat model, accuracy, transfer matrix, worst case, alarms and checks."""

from __future__ import annotations

from typing import Literal

from toolkit.reports.schema.parts import Part, Share

SurrogateName = Literal["original", "float", "fake_quantised", "twin"]
TargetName = Literal["torch", "fp32", "deployed", "deployed_unoptimised"]


class Threat(Part):
    """What the attacker may do; eps in pixels, or behind the normalisation."""

    preset: str
    norm: Literal["linf", "l2", "l1"]
    eps: float
    space: Literal["pixels", "normalised"]
    clip: bool


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
    max_difference: float | None
    """None: infinite, as where one side's logits are no numbers."""
    relative: float | None
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
