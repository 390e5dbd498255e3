"""Short experiments that show whether a robustness figure can be trusted, and how accuracy falls with the radius."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from toolkit.artifacts import Batch, Predictor, Proportion, Split, derive_seed
from toolkit.attacks.losses import cross_entropy
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import RELATIVE_STEP, PgdPlan
from toolkit.evaluators.accuracy import correct
from toolkit.evaluators.evaluation import Conditions
from toolkit.progress import Task, task

PROBED_IMAGES = 512
"""At most so many evaluation images are probed."""
RADII = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Of the security curve, in units of the threat model's radius; the last point is the whole range of pixels."""
STEPS = (0.1, 0.5, 1.0, 2.0)
"""Of the ladder of steps, in units of the plan's."""
REPEATED_IMAGES = 64
FIRST_STREAM = 2000
"""Seeds of probes are apart from those of the attacks that are reported."""

INPUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "pixels in [0, 255]": lambda images: images * 255.0,
    "pixels in [-1, 1]": lambda images: images * 2.0 - 1.0,
    "pixels standardised by channel": lambda images: _standardised(images),
    "negative images": lambda images: 1.0 - images,
}
"""Other forms in which a graph may want its images."""


@dataclass(frozen=True, slots=True)
class Point:
    """Accuracy of the graph that counts under PGD of one radius and number of steps (0: clean)."""

    eps: float
    steps: int
    robust: Proportion


@dataclass(frozen=True)
class GradientProbes:
    """What needs a surrogate."""

    curve: tuple[Point, ...]
    """By rising radius, the clean point first; the last one lets the attack do nearly anything."""
    ladder: tuple[Point, ...]
    """By rising number of steps."""
    zero_gradients: Proportion
    """Images at which the loss's gradient is exactly 0."""
    loss_fell: Proportion
    """Images whose loss is lower after the attack than before."""


@dataclass(frozen=True)
class InputProbes:
    """What only needs the graph that counts."""

    accuracy: Proportion
    others: Mapping[str, Proportion]
    """Accuracy with the images in other forms, by the form's name."""
    changed: Proportion
    """Images whose label changes when they are predicted again, in other company."""
    majority: float
    """Share of the commonest class: what guessing reaches."""


def probe_inputs(primary: Predictor, split: Split) -> InputProbes:
    """How the graph that counts answers to clean images, in this form and in others.

    Args:
        primary: the graph that counts.
        split: the evaluation images, of which the first `PROBED_IMAGES` are probed.
    """
    probed = split.first(PROBED_IMAGES)
    right: list[Tensor] = []
    others: dict[str, list[Tensor]] = {name: [] for name in INPUTS}
    for batch in probed.batches():
        right.append(correct(primary, batch.images, batch.labels))
        for name, change in INPUTS.items():
            others[name].append(correct(primary, change(batch.images), batch.labels))
    _, counts = np.unique(probed.labels, return_counts=True)
    return InputProbes(
        Proportion.of(torch.cat(right)),
        {name: Proportion.of(torch.cat(flags)) for name, flags in others.items()},
        _changed(primary, next(iter(probed.first(REPEATED_IMAGES).batches()))),
        float(counts.max()) / len(probed),
    )


def _changed(primary: Predictor, batch: Batch) -> Proportion:
    """Predicted together, together in the other order, and in two halves: a sound network always says the same."""
    first = primary.predict(batch.images).argmax(dim=1)
    turned = primary.predict(batch.images.flip(0)).argmax(dim=1).flip(0)
    halves = torch.cat(
        [primary.predict(part).argmax(dim=1) for part in torch.tensor_split(batch.images, 2) if len(part)]
    )
    return Proportion.of((turned != first) | (halves != first))


def probe_gradients(surrogate: Surrogate, primary: Predictor, split: Split, conditions: Conditions) -> GradientProbes:
    """PGD with more steps and at other radii, scored on the graph that counts.

    Args:
        surrogate: on which the attacks are made.
        primary: the graph that counts.
        split: the evaluation images, of which the first `PROBED_IMAGES` are probed.
        conditions: threat model, schedule and seed.
    """
    probed = split.first(PROBED_IMAGES)
    plans = [*_radii(conditions.plan, conditions, split.images.shape), *_ladder(conditions.plan)]
    with task("probes", (len(plans) + 2) * len(probed)) as bar:
        robust = [_robust(surrogate, primary, probed, plan, conditions.seed, bar) for plan in plans]
        clean = _accuracy(primary, probed, bar)
        flat, fell = _loss(surrogate, probed, conditions, bar)
    points = [Point(plan.threat.eps, plan.steps, share) for plan, share in zip(plans, robust, strict=True)]
    curve, ladder = points[: len(RADII) + 1], points[len(RADII) + 1 :]
    return GradientProbes((Point(0.0, 0, clean), *curve), tuple(ladder), flat, fell)


def _radii(plan: PgdPlan, conditions: Conditions, shape: tuple[int, int, int]) -> list[PgdPlan]:
    threat = plan.threat
    scale = float(threat.pixel_scale(conditions.normalization).min())
    pixels = math.prod(shape)
    everything = {"linf": 1.0, "l2": math.sqrt(pixels), "l1": float(pixels)}[threat.norm]  # from black to white
    largest = max(everything / scale, 4 * threat.eps)
    return [_at(plan, factor * threat.eps) for factor in RADII] + [_at(plan, largest)]


def _at(plan: PgdPlan, eps: float) -> PgdPlan:
    step = plan.step_size * eps / plan.threat.eps
    return replace(plan, threat=replace(plan.threat, eps=eps), step_size=step, restarts=1)


def _ladder(plan: PgdPlan) -> list[PgdPlan]:
    counts: Sequence[int] = sorted({max(1, round(share * plan.steps)) for share in STEPS})
    return [
        replace(plan, steps=count, step_size=min(1.0, RELATIVE_STEP / count) * plan.threat.eps, restarts=1)
        for count in counts
    ]


def _robust(surrogate: Surrogate, primary: Predictor, probed: Split, plan: PgdPlan, seed: int, bar: Task) -> Proportion:
    """Images right clean and attacked."""
    flags = []
    for number, batch in enumerate(probed.batches()):
        generator = torch.Generator().manual_seed(derive_seed(seed, FIRST_STREAM, number))
        attacked = pgd(surrogate, batch.images, batch.labels, plan, generator).cpu()
        flags.append(correct(primary, attacked, batch.labels) & correct(primary, batch.images, batch.labels))
        bar.advance(len(batch))
    return Proportion.of(torch.cat(flags))


def _accuracy(primary: Predictor, probed: Split, bar: Task) -> Proportion:
    flags = []
    for batch in probed.batches():
        flags.append(correct(primary, batch.images, batch.labels))
        bar.advance(len(batch))
    return Proportion.of(torch.cat(flags))


def _loss(surrogate: Surrogate, probed: Split, conditions: Conditions, bar: Task) -> tuple[Proportion, Proportion]:
    """Images with a gradient of exactly 0, and images whose loss the attack lowers."""
    flat, fell = [], []
    for number, batch in enumerate(probed.batches()):
        images, labels = batch.images.to(surrogate.device), batch.labels.to(surrogate.device)
        slope = surrogate.differentiate(images, partial(cross_entropy, labels=labels))
        generator = torch.Generator().manual_seed(derive_seed(conditions.seed, FIRST_STREAM, number))
        attacked = pgd(surrogate, images, labels, conditions.plan, generator)
        after = cross_entropy(surrogate.logits(attacked), labels)
        flat.append((slope.gradient == 0).flatten(1).all(dim=1).cpu())
        fell.append((after < slope.loss).cpu())
        bar.advance(len(batch))
    return Proportion.of(torch.cat(flat)), Proportion.of(torch.cat(fell))


def _standardised(images: Tensor) -> Tensor:
    mean = images.mean(dim=(0, 2, 3), keepdim=True)
    return (images - mean) / images.std(dim=(0, 2, 3), keepdim=True).clamp_min(1e-6)
