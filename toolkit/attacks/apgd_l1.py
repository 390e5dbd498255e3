"""Auto-PGD in l1 (Croce & Hein 2021): steps as sparse as the perturbation has become, from larger balls inwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolkit.attacks.losses import Objective
from toolkit.attacks.pgd import constrain, movable
from toolkit.attacks.projections import ascend_l1
from toolkit.attacks.surrogate import Slope, Surrogate
from toolkit.attacks.survivors import Settle, Survivors, judged
from toolkit.attacks.threat import ThreatModel

PHASES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
"""Radii, in units of the threat model's, and the share of the steps that each gets."""
SPARSER = 1.5
"""A step moves as many pixels as the best perturbation has, divided by this."""
SHRINKING = 0.95
"""While the perturbation's pixels fall below this share of those at the last check, steps stay long."""
REDUCTION, LARGEST_REDUCTION = 1.5, 10.0
"""By how much steps are shortened otherwise, at a time and in all."""
CHECK_EVERY = 0.04
"""Share of a phase's steps between checks."""
SUBMIT_EVERY = 10
"""Steps after which all survivors are judged, whatever the surrogate makes of them."""


@dataclass
class _State:
    """One row per survivor."""

    images: Tensor
    labels: Tensor
    targets: Tensor
    current: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    logits: Tensor
    step: Tensor
    """[n, 1, 1, 1], in the units of the ball."""
    share: Tensor
    """Of the pixels that a step moves, [n]."""
    pixels: Tensor
    """Of the best perturbation at the last check, [n]."""


def climb_l1(
    surrogate: Surrogate,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    objective: Objective,
    threat: ThreatModel,
    steps: int,
    generator: torch.Generator,
    settle: Settle | None,
    start: Tensor | None = None,
) -> Tensor:
    """The attacked images of highest loss, float32 [n, C, H, W]; settled ones as they were when settled.

    Args:
        surrogate: whose loss is raised.
        images: float32 [n, C, H, W] in [0, 1].
        labels: int64 [n], the true classes.
        targets: int64 [n], handed to the objective.
        objective: the loss.
        threat: an l1 ball.
        steps: gradients per image, over all radii.
        generator: of the random start: noise, brought into the largest ball, which leaves it sparse.
        settle: ends the attack on images that fool the graph that counts.
        start: float32 [n, C, H, W], where the attack begins, in this ball alone; None: in noise, in larger balls first.
    """
    images, labels, targets = (value.to(surrogate.device) for value in (images, labels, targets))
    scale = threat.pixel_scale(surrogate.normalization).to(images.device)
    survivors = Survivors(images, settle)
    climber = _Climber(surrogate, objective, survivors, threat, scale)
    shares = budgets(steps) if start is None else (*(0 for _ in PHASES[:-1]), steps)
    if start is None:
        start = images + scale * torch.randn(images.shape, generator=generator).to(images.device)
    points = start.to(images.device)
    for (factor, _), budget in zip(PHASES, shares, strict=True):
        if budget:
            ball = replace(threat, eps=factor * threat.eps)
            state = climber.begin(images, labels, targets, constrain(points, images, ball, scale), ball)
            state = climber.run(state, ball, budget)
            images, labels, targets, points = state.images, state.labels, state.targets, state.best
    return survivors.finish(points)


def budgets(steps: int) -> tuple[int, ...]:
    """The steps of each phase; together `steps`, the last phase never without any."""
    early = [min(math.ceil(share * steps), (steps - 1) // 2) for _, share in PHASES[:-1]]
    return (*early, steps - sum(early))


@dataclass(frozen=True)
class _Climber:
    surrogate: Surrogate
    objective: Objective
    survivors: Survivors
    threat: ThreatModel
    """Of the attack; single phases have larger balls."""
    scale: Tensor

    def begin(self, images: Tensor, labels: Tensor, targets: Tensor, points: Tensor, ball: ThreatModel) -> _State:
        """The state at `points`, with the longest steps; its gradient is the first of the phase."""
        slope = self._slope(points, labels, targets)
        pixels = _changed(points, images)
        return _State(
            images=images,
            labels=labels,
            targets=targets,
            current=points,
            gradient=slope.gradient,
            best=points,
            best_gradient=slope.gradient,
            best_loss=slope.loss,
            logits=slope.logits,
            step=torch.full((len(images), 1, 1, 1), ball.eps, device=images.device),
            share=pixels / images[0].numel() / SPARSER,
            pixels=pixels,
        )

    def run(self, state: _State, ball: ThreatModel, steps: int) -> _State:
        """What is left of one phase of `steps` gradients; images are judged in the last phase alone."""
        period = max(1, int(CHECK_EVERY * steps))
        last = ball.eps == self.threat.eps
        if last:
            state = judged(state, self.survivors, state.logits, everything=steps == 1)
        for step in range(1, steps):
            if not len(state.labels):
                return state
            gradient = movable(state.gradient, state.current) if ball.clip else state.gradient
            direction = ascend_l1(gradient * self.scale, state.share)
            ahead = state.current + state.step * self.scale * direction
            state.current = constrain(ahead, state.images, ball, self.scale)
            _record(state, self._slope(state.current, state.labels, state.targets))
            if last:  # before any goes back to its best point
                everything = (step + 1) % SUBMIT_EVERY == 0 or step == steps - 1
                state = judged(state, self.survivors, state.logits, everything=everything)
            if step % period == 0 and len(state.labels):
                _adapt(state, ball.eps)
        return state

    def _slope(self, points: Tensor, labels: Tensor, targets: Tensor) -> Slope:
        return self.surrogate.differentiate(points, lambda logits: self.objective(logits, labels, targets))


def _record(state: _State, slope: Slope) -> None:
    """What the last step came to."""
    state.gradient, state.logits = slope.gradient, slope.logits
    better = slope.loss > state.best_loss
    state.best_loss = torch.where(better, slope.loss, state.best_loss)
    mask = better.view(-1, 1, 1, 1)
    state.best = torch.where(mask, state.current, state.best)
    state.best_gradient = torch.where(mask, slope.gradient, state.best_gradient)


def _changed(points: Tensor, images: Tensor) -> Tensor:
    """Entries that differ, float32 [n]."""
    return (points != images).flatten(1).sum(dim=1).float()


def _adapt(state: _State, eps: float) -> None:
    """Long steps from the best point while the perturbation grows sparser, shorter ones from here otherwise."""
    pixels = _changed(state.best, state.images)
    sparser = pixels < SHRINKING * state.pixels
    state.pixels = pixels
    state.share = pixels / state.images[0].numel() / SPARSER
    mask = sparser.view(-1, 1, 1, 1)
    state.step = torch.where(mask, eps, (state.step / REDUCTION).clamp_min(eps / LARGEST_REDUCTION))
    state.current = torch.where(mask, state.best, state.current)
    state.gradient = torch.where(mask, state.best_gradient, state.gradient)
