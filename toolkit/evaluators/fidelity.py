"""How faithful a twin is to the session that runs the file, and how much its quantisers clip."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.artifacts import Normalized, Predictor, Proportion
from toolkit.errors import ToolkitError
from toolkit.evaluators.twin.network import TwinNetwork
from toolkit.evaluators.twin.quantised import outside

FIDELITY_LIMIT = 0.99
"""Least share of images with the same label; below it, what was attacked is not what is deployed."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Agreement of a twin with the session that runs the file, on the same images."""

    agreement_clean: Proportion
    """Share of clean images with the same label."""
    agreement_attacked: Proportion | None
    """The same of attacked images; None if none were given."""
    max_difference: float
    """Largest absolute difference of a logit, clean or attacked."""
    relative: float
    """The same over the standard deviation of the session's logits."""

    @property
    def valid(self) -> bool:
        """Figures that rest on the twin count."""
        shares = (self.agreement_clean, self.agreement_attacked)
        return all(share is None or share.value >= FIDELITY_LIMIT for share in shares)

    @property
    def _differences(self) -> dict[str, float]:
        return {"max_difference": self.max_difference, "relative": self.relative}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the report; a difference that is not finite is None."""
        finite = {name: value if math.isfinite(value) else None for name, value in self._differences.items()}
        return {
            "agreement_clean": self.agreement_clean.as_dict(),
            "agreement_attacked": None if self.agreement_attacked is None else self.agreement_attacked.as_dict(),
            **finite,
            "valid": self.valid,
        }


def compare(
    twin: Predictor,
    predictor: Predictor,
    clean: Iterable[Tensor],
    attacked: Iterable[Tensor],
    normalise: Callable[[Tensor], Tensor],
) -> Fidelity:
    """Run both on all images; `normalise` is applied to the logits of both before their difference is taken.

    Raises:
        ToolkitError: no clean images.
    """
    pairs = [_both(twin, predictor, batches, normalise) for batches in (clean, attacked)]
    if pairs[0] is None:
        raise ToolkitError("there are no images to compare on", found="0 clean images", fix="raise --n")
    present = [pair for pair in pairs if pair is not None]
    wanted = torch.cat([pair[1] for pair in present])
    difference = max(_difference(found, expected) for found, expected in present)
    spread = float(wanted[wanted.isfinite()].std())
    return Fidelity(
        _agreement(pairs[0]),
        None if pairs[1] is None else _agreement(pairs[1]),
        difference,
        difference / spread if spread > 0 else (0.0 if difference == 0 else math.inf),
    )


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest; none between equal infinities, infinite where one side alone is no finite number."""
    gaps = torch.where(found == expected, 0.0, (found - expected).abs())
    return float(gaps.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def _both(
    twin: Predictor, predictor: Predictor, batches: Iterable[Tensor], normalise: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor] | None:
    found, wanted = [], []
    for images in batches:
        found.append(normalise(twin.predict(images)))
        wanted.append(normalise(predictor.predict(images)))
    return (torch.cat(found), torch.cat(wanted)) if found else None


def _agreement(pair: tuple[Tensor, Tensor]) -> Proportion:
    return Proportion.of(pair[0].argmax(dim=1) == pair[1].argmax(dim=1))


def count_saturated(module: Normalized, batches: Iterable[Tensor]) -> dict[str, float]:
    """Share of values outside of every quantiser's range, by the name of the quantised tensor."""
    copied = copy.deepcopy(module).eval()
    network = copied.network
    if not isinstance(network, TwinNetwork):
        raise TypeError("only a twin has quantisers to watch")
    clipped: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)

    def count(operator: str, name: str, inputs: tuple[Any, ...], attributes: Mapping[str, Any]) -> None:
        if operator == "QuantizeLinear":
            chosen = {key: attributes[key] for key in ("axis", "offset", "ends") if key in attributes}
            beyond = outside(*inputs, **chosen)
            clipped[name] += int(beyond.sum())
            total[name] += beyond.numel()

    network.observe(count)
    with torch.inference_mode():
        for images in batches:
            copied(images.to(copied.mean.device))
    return {name: clipped[name] / total[name] for name in total}
