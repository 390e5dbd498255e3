"""The exponential moving average of a network's weights, which is validated and shipped in their place."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from toolkit.artifacts import Normalized

WARM_UP = 10
"""The decay after step t is at most (1 + t) / (WARM_UP + t), so that the start weights are soon forgotten."""


class WeightAverage:
    """An average of `module`'s weights (Polyak and Juditsky 1992; Izmailov et al. 2018), updated after every step.

    Floating-point buffers, as the statistics of batch norm, are averaged with the same decay, so that they are those of
    about the same weights; counters are copied.

    Args:
        module: the network in training.
        decay: share of the old average that one step keeps, in (0, 1).
    """

    def __init__(self, module: Normalized, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False)
        self._decay = decay

    def update(self, module: Normalized, step: int) -> None:
        """Take in the weights of `module` after step number `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (WARM_UP + step))
        current = module.network.state_dict()
        averaged: list[Tensor] = []
        new: list[Tensor] = []
        for name, mine in self.module.network.state_dict().items():
            if mine.is_floating_point() or mine.is_complex():
                averaged.append(mine)
                new.append(current[name])
            else:
                mine.copy_(current[name])
        with torch.no_grad():
            torch._foreach_lerp_(averaged, new, 1 - decay)

    def state(self) -> dict[str, Tensor]:
        """The averaged weights and buffers."""
        return self.module.network.state_dict()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        self.module.network.load_state_dict(state)
