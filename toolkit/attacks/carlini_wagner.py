"""Carlini & Wagner's l2 attack (2017): Adam on the squared norm and the margin, whose weight is searched.

The pixel range is built in by a change of variables, image = (1 + tanh w) / 2; without clipping w is the image itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.attacks.losses import margin
from toolkit.attacks.minimum_norm import MinimumNorm, Search, require_norm
from toolkit.attacks.surrogate import Slope, Surrogate
from toolkit.attacks.survivors import Settle, narrowed
from toolkit.attacks.threat import ThreatModel

SEARCHES = 9
"""Constants tried per image, each with all steps."""
FIRST_CONSTANT = 1e-3
RAISE = 10.0
"""By how much the constant is raised as long as the surrogate was never fooled."""
STEP_SIZE = 0.1
"""Of Adam, in w. The paper's 0.01 wants its thousands of steps: with 50, this finds perturbations half as large."""
DECAYS = (0.9, 0.999)
TINY = 1e-8
INNER = 0.999999
"""How much of the pixel range has a finite w."""


@dataclass
class _State:
    """One row per image still attacked."""

    images: Tensor
    labels: Tensor
    constant: Tensor
    low: Tensor
    """The largest constant that was too small, [n]."""
    high: Tensor
    """The smallest that sufficed; inf for none yet."""
    sufficed: Tensor
    """Whether the surrogate was fooled under the present constant, bool [n]."""
    variable: Tensor
    first: Tensor
    """Adam's mean of gradients."""
    second: Tensor
    """Adam's mean of squared gradients."""


def carlini_wagner(
    surrogate: Surrogate,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    searches: int = SEARCHES,
    step_size: float = STEP_SIZE,
    settle: Settle | None = None,
) -> MinimumNorm:
    """The smallest perturbations in l2 found that fool the surrogate into any class.

    Args:
        surrogate: that is to be fooled.
        images: float32 [n, C, H, W] in [0, 1].
        labels: int64 [n], the true classes.
        threat: space and clipping of an l2 ball; its radius matters only to what is judged.
        steps: gradients per image and constant.
        searches: constants tried per image.
        step_size: of Adam.
        settle: ends the attack on images that fool the graph that counts.

    Raises:
        ToolkitError: a threat model in l-inf or l1.
    """
    require_norm("the Carlini-Wagner attack", threat, ("l2",))
    search = Search(surrogate, images, labels, threat, settle)
    state = _begin(search)
    for _ in range(searches):
        state = _minimise(surrogate, search, state, steps, step_size)
        if not len(search):
            break
        _next_constant(search, state)
    return search.finish()


def _begin(search: Search) -> _State:
    images, count = search.images, len(search.labels)
    constant = torch.full((count,), FIRST_CONSTANT, device=images.device)
    return _State(
        images=images,
        labels=search.labels,
        constant=constant,
        low=torch.zeros_like(constant),
        high=torch.full_like(constant, torch.inf),
        sufficed=torch.zeros(count, dtype=torch.bool, device=images.device),
        variable=_to_variable(images, search.threat),
        first=torch.zeros_like(images),
        second=torch.zeros_like(images),
    )


def _minimise(surrogate: Surrogate, search: Search, state: _State, steps: int, step_size: float) -> _State:
    """All steps of Adam under the present constants."""
    for step in range(1, steps + 1):
        current = _to_images(state.variable, search.threat)
        slope = _slope(surrogate, state, current)
        fooled = slope.logits.argmax(dim=1) != state.labels
        state.sufficed = state.sufficed | fooled
        search.record(current, fooled)
        _descend(search, state, current, slope, step, step_size)
        keep = search.settle(everything=step == steps)
        if keep is not None:
            state = narrowed(state, keep)
        if not len(search):
            break
    return state


def _slope(surrogate: Surrogate, state: _State, current: Tensor) -> Slope:
    """The true class's logit over the others, until it is below them."""
    return surrogate.differentiate(current, lambda logits: (-margin(logits, state.labels)).clamp_min(0))


def _descend(search: Search, state: _State, current: Tensor, slope: Slope, step: int, step_size: float) -> None:
    """One step of Adam (Kingma & Ba 2015) on the squared norm, in units of the ball, plus the weighted margin."""
    gradient = 2 * (current - state.images) / search.scale**2 + state.constant.view(-1, 1, 1, 1) * slope.gradient
    if search.threat.clip:
        gradient = gradient * 2 * current * (1 - current)
    state.first = DECAYS[0] * state.first + (1 - DECAYS[0]) * gradient
    state.second = DECAYS[1] * state.second + (1 - DECAYS[1]) * gradient.square()
    mean, square = state.first / (1 - DECAYS[0] ** step), state.second / (1 - DECAYS[1] ** step)
    state.variable = state.variable - step_size * mean / (square.sqrt() + TINY)


def _next_constant(search: Search, state: _State) -> None:
    """Bisect between constants that were too small and that sufficed; start anew at the images."""
    state.high = torch.where(state.sufficed, state.constant, state.high)
    state.low = torch.where(state.sufficed, state.low, state.constant)
    state.constant = torch.where(state.high.isinf(), RAISE * state.constant, (state.low + state.high) / 2)
    state.sufficed = torch.zeros_like(state.sufficed)
    state.variable = _to_variable(state.images, search.threat)
    state.first, state.second = torch.zeros_like(state.first), torch.zeros_like(state.second)


def _to_variable(images: Tensor, threat: ThreatModel) -> Tensor:
    return torch.atanh((2 * images - 1) * INNER) if threat.clip else images


def _to_images(variable: Tensor, threat: ThreatModel) -> Tensor:
    return (1 + torch.tanh(variable)) / 2 if threat.clip else variable
