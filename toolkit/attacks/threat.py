"""Threat models, and the presets that fix one per data set together with a PGD schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from toolkit.artifacts import Normalization
from toolkit.config import ThreatConfig
from toolkit.errors import ToolkitError


@dataclass(frozen=True, slots=True)
class ThreatModel:
    """What an attacker may do to an image: a ball of radius `eps`, and whether pixels stay in [0, 1]."""

    norm: Literal["linf", "l2", "l1"]
    eps: float
    space: Literal["pixels", "normalised"]
    """Where the ball lies: in pixels [0, 1], or behind the model's normalisation."""
    clip: bool
    """Whether attacked pixels are clipped to [0, 1]."""

    def pixel_scale(self, normalization: Normalization) -> Tensor:
        """Pixels per unit of the ball's space, float32 [1, C, 1, 1]."""
        std = torch.tensor(normalization.std)
        return (torch.ones_like(std) if self.space == "pixels" else std).view(1, -1, 1, 1)

    def margin(self, normalization: Normalization) -> float:
        """How far attacked pixels may leave [0, 1], in pixels."""
        return 0.0 if self.clip else self.eps * float(self.pixel_scale(normalization).max())


@dataclass(frozen=True, slots=True)
class PgdPlan:
    """A threat model with the PGD schedule that measures it."""

    preset: str
    threat: ThreatModel
    steps: int
    step_size: float
    """In the units of the threat model's ball."""
    random_start: bool
    restarts: int = 1

    def record(self) -> dict[str, Any]:
        """The threat model as it stands in reports."""
        threat = self.threat
        return {
            "preset": self.preset,
            "norm": threat.norm,
            "eps": threat.eps,
            "space": threat.space,
            "clip": threat.clip,
        }


STEPS = 20
PAPER_STEP = 0.01
"""The paper's step size, in its normalised space."""
RELATIVE_STEP = 2.5
"""Madry et al. 2018: the steps together can cross the ball 2.5 times its radius."""


def _pixel(eps: float) -> PgdPlan:
    threat = ThreatModel("linf", eps, "pixels", clip=True)
    return PgdPlan("pixel", threat, STEPS, RELATIVE_STEP * eps / STEPS, random_start=True)


def _paper(eps: float) -> PgdPlan:
    return PgdPlan("paper", ThreatModel("linf", eps, "normalised", clip=False), STEPS, PAPER_STEP, random_start=False)


PRESETS: Mapping[tuple[str, str], PgdPlan] = {
    ("pixel", "fashion-mnist"): _pixel(0.1),
    ("pixel", "cifar10"): _pixel(8 / 255),
    ("paper", "fashion-mnist"): _paper(0.1),
    ("paper", "cifar10"): _paper(8 / 255),
}
"""By (preset, data set). `paper` is Thorsteinsson et al. 2024 as it was run: eps normalised, no clipping."""


def resolve_plan(config: ThreatConfig, data_key: str | None) -> PgdPlan:
    """The preset of the data set, with what `config` sets in its place.

    Args:
        config: the user's choices.
        data_key: `fashion-mnist`, `cifar10`, or None for a data set without presets.

    Raises:
        ToolkitError: no preset fits and `--eps` is not given, or restarts that would all be the same.
    """
    if config.random_start is False and config.restarts > 1:
        raise ToolkitError(
            "restarts from the image itself are all the same attack",
            found=f"--zero-start (random_start: false) with --restarts {config.restarts}",
            fix="leave --zero-start away (or pass --random-start), or make it --restarts 1",
        )
    known = PRESETS.get((config.preset, data_key or "")) if config.norm == "linf" else None
    if known is None and config.eps is None:
        raise ToolkitError(
            f"--threat {config.preset} has no {config.norm} preset for this data set",
            found=data_key or "a data set without presets",
            fix="state the radius: --eps 8/255 (l-inf), --eps 0.5 with --norm l2 or --eps 12 with --norm l1",
        )
    if known is None:
        assert config.eps is not None
        plan = _pixel(config.eps) if config.preset == "pixel" else _paper(config.eps)
        plan = replace(plan, threat=replace(plan.threat, norm=config.norm))
    else:
        plan = known
    if config.eps is not None and config.eps != plan.threat.eps:
        plan = replace(plan, threat=replace(plan.threat, eps=config.eps))
    steps = config.steps or plan.steps
    default_step = RELATIVE_STEP * plan.threat.eps / steps
    if plan.preset == "paper" and steps * PAPER_STEP >= plan.threat.eps:
        default_step = PAPER_STEP
    random_start = plan.random_start if config.random_start is None else config.random_start
    return replace(
        plan,
        steps=steps,
        step_size=config.step_size or default_step,
        random_start=random_start or config.restarts > 1,
        restarts=config.restarts,
    )
