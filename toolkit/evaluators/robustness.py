"""Robust accuracy: attacks made on a differentiable surrogate, scored on every graph that counts.

Every transfer cell runs all steps on all images. Stopping early once the surrogate is fooled would leave the other
graphs with weaker attacks and inflate their figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from toolkit.artifacts import Predictor, Proportion, Split, TorchModel, derive_seed
from toolkit.attacks.pgd import largest_violation, pgd, rounding
from toolkit.attacks.surrogate import Surrogate, compute_device, resolve_precision
from toolkit.attacks.threat import PgdPlan
from toolkit.evaluators.accuracy import correct
from toolkit.progress import task

SurrogateName = Literal["original", "float", "fake_quantised", "twin"]
TargetName = Literal["torch", "fp32", "deployed", "deployed_unoptimised"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """One attack made on `surrogate` and scored on `target`."""

    attack: str
    surrogate: SurrogateName
    target: TargetName
    robust: Proportion
    """Images that the target still classifies rightly under the attack, of all images."""
    transfer_rate: Proportion | None
    """Of the images clean-correct on both and fooled on the surrogate, the share that fools the target too."""


@dataclass(frozen=True)
class Robustness:
    """What all graphs have left under the same attack on the same images."""

    transfers: tuple[Transfer, ...]
    clean: Mapping[str, Proportion]
    worst_case: Mapping[str, Proportion]
    """Per target: share of images right when clean and under every attack."""
    clipped_share: float | None
    """Share of attacked pixels outside the range of the deployed graph's input quantiser; None if it was not asked."""


def evaluate_robustness(
    model: TorchModel,
    targets: Mapping[TargetName, Predictor],
    split: Split,
    plan: PgdPlan,
    *,
    seed: int,
    surrogate: SurrogateName = "float",
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    input_range: tuple[float, float] | None = None,
) -> Robustness:
    """Attack `model` by PGD and score the attacked images, in float32, on it and on every target.

    Args:
        model: the surrogate, named `surrogate` in the result.
        targets: the graphs to be judged, by name.
        split: the images, all of which are attacked.
        plan: threat model, steps, start and restarts.
        seed: of the random starts; each batch has its own, so that the figures do not depend on what ran before.
        precision: of the surrogate's gradients; scoring is always in float32.
        input_range: pixels that the deployed graph's input quantiser represents.
    """
    spec = model.spec
    attacker = Surrogate(model.module, spec.normalization, resolve_precision(precision), input_shape=spec.input_shape)
    judges = _Judges(model, targets)
    tally = _Tally(list(targets))
    with task(f"PGD-{plan.steps} on {surrogate}", len(split) * plan.restarts) as bar:
        for number, batch in enumerate(split.batches()):
            tally.begin(*judges.correct(batch.images, batch.labels))
            for restart in range(plan.restarts):
                generator = torch.Generator().manual_seed(derive_seed(seed, number, restart))
                attacked = pgd(attacker, batch.images, batch.labels, plan, generator).cpu()
                over = largest_violation(attacked, batch.images, plan.threat, spec.normalization)
                if over > rounding(attacked.shape, plan.threat, spec.normalization):
                    raise RuntimeError(f"PGD left its threat model by {over:g}")
                tally.add(*judges.correct(attacked, batch.labels))
                if input_range is not None:
                    tally.count_clipped(attacked, input_range)
                bar.advance(len(batch))
    return tally.result(f"pgd-{plan.steps}", surrogate)


class _Judges:
    """The surrogate's own network and the targets; torch networks are copied to where they compute fastest."""

    def __init__(self, model: TorchModel, targets: Mapping[TargetName, Predictor]) -> None:
        self._own = self._placed(model)
        self._others = {name: self._placed(target) for name, target in targets.items() if target is not model}
        self._names = list(targets)

    @staticmethod
    def _placed(predictor: Predictor) -> Predictor:
        device = compute_device()
        if not isinstance(predictor, TorchModel) or predictor.module.mean.device.type == device.type:
            return predictor
        copied = predictor.copy()
        copied.module.to(device)
        return copied

    def correct(self, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[TargetName, Tensor]]:
        """Which images are classified rightly, on the surrogate's network and by target."""
        own = correct(self._own, images, labels)
        found = {name: correct(other, images, labels) for name, other in self._others.items()}
        return own, {name: found.get(name, own) for name in self._names}


@dataclass
class _Tally:
    """Flags of every image, batch by batch: on the surrogate (key `None`) and on every target."""

    targets: list[TargetName]
    clean: dict[TargetName | None, list[Tensor]] = field(default_factory=dict)
    attacked: dict[TargetName | None, list[Tensor]] = field(default_factory=dict)
    clipped: int = 0
    pixels: int = 0

    def begin(self, surrogate: Tensor, targets: Mapping[TargetName, Tensor]) -> None:
        for name, flags in self._all(surrogate, targets):
            self.clean.setdefault(name, []).append(flags)
            self.attacked.setdefault(name, []).append(torch.ones_like(flags))

    def add(self, surrogate: Tensor, targets: Mapping[TargetName, Tensor]) -> None:
        """One more restart of the batch that was begun last; the worst one counts for every graph on its own."""
        for name, flags in self._all(surrogate, targets):
            self.attacked[name][-1] &= flags

    @staticmethod
    def _all(surrogate: Tensor, targets: Mapping[TargetName, Tensor]) -> list[tuple[TargetName | None, Tensor]]:
        return [(None, surrogate), *targets.items()]

    def count_clipped(self, attacked: Tensor, input_range: tuple[float, float]) -> None:
        low, high = input_range
        self.clipped += int(((attacked < low) | (attacked > high)).sum())
        self.pixels += attacked.numel()

    def result(self, attack: str, surrogate: SurrogateName) -> Robustness:
        clean = {name: torch.cat(flags) for name, flags in self.clean.items()}
        attacked = {name: torch.cat(flags) for name, flags in self.attacked.items()}
        transfers = []
        for name in self.targets:
            eligible = clean[None] & clean[name] & ~attacked[None]
            rate = Proportion.of(~attacked[name][eligible]) if bool(eligible.any()) else None
            transfers.append(Transfer(attack, surrogate, name, Proportion.of(attacked[name]), rate))
        return Robustness(
            tuple(transfers),
            {name: Proportion.of(clean[name]) for name in self.targets},
            {name: Proportion.of(clean[name] & attacked[name]) for name in self.targets},
            self.clipped / self.pixels if self.pixels else None,
        )
