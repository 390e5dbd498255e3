"""About how long a step takes on this machine."""

from __future__ import annotations

import time

import torch

from toolkit.artifacts import ModelSpec, Normalized, TorchModel
from toolkit.attacks.surrogate import Surrogate, resolve_precision
from toolkit.config import TrainConfig
from toolkit.models.registry import build_network
from toolkit.reproduce.recipes import Planner
from toolkit.reproduce.steps import TRAININGS, Step
from toolkit.reproduce.world import World
from toolkit.training.losses import cost_per_image

PROBE = 64
"""Images of a batch in training, on which the machine's speed is measured."""
ENSEMBLE_COST = 600
"""Gradients per image of AutoAttack's composition, about: most images need only its short forms."""
DEEPFOOL_COST = 100
SURROGATES = 4
"""By how many an integer graph's attack is dearer: three networks, of which two round."""
SMALL_S = 10.0
"""Of what neither trains nor attacks."""


class Estimator:
    """Measures once how long one gradient takes, by network."""

    def __init__(self) -> None:
        self._gradient: dict[tuple[str, tuple[int, int, int]], float] = {}
        self._seconds: dict[Step, float] = {}

    def seconds(self, step: Step, planner: Planner, world: World) -> float:
        """Of the step alone, without what it needs."""
        if step not in self._seconds:
            self._seconds[step] = self._estimate(step, planner, world)
        return self._seconds[step]

    def _estimate(self, step: Step, planner: Planner, world: World) -> float:
        if step.kind not in (*TRAININGS, "measure"):
            return SMALL_S
        share = _share_left(step)
        gradient = self._seconds_per_gradient(planner.network, world) * share
        if step.kind in TRAININGS:
            config = TrainConfig.model_validate({**step.settings["config"], "qat": step.kind == "qat"})
            return config.epochs * len(planner.splits.train) * cost_per_image(config) * gradient
        measure = step.settings["measure"]
        cost = {"autoattack": ENSEMBLE_COST, "deepfool": DEEPFOOL_COST}.get(
            measure.split("-")[0], step.settings["plan"][1]
        )
        many = {"float": 1, "simulated": 2, "qat": 3, "integer": SURROGATES}[step.settings["form"]]
        return float(step.settings["evaluation"][0] * cost * many * gradient)

    def _seconds_per_gradient(self, network: str, world: World) -> float:
        source = world.source
        key = (network, source.train.shape)
        if key not in self._gradient:
            module = Normalized(
                build_network(network, len(source.train.class_names), source.train.shape), source.normalization_hint
            ).eval()
            spec = ModelSpec(network, source.train.class_names, source.train.shape, source.normalization_hint)
            self._gradient[key] = _measure(TorchModel(module, spec))
        return self._gradient[key]


def _measure(model: TorchModel) -> float:
    spec = model.spec
    surrogate = Surrogate(model.module, spec.normalization, resolve_precision("auto"), input_shape=spec.input_shape)
    images, labels = torch.rand(PROBE, *spec.input_shape), torch.zeros(PROBE, dtype=torch.int64)
    surrogate.gradient(images, labels)
    start = time.perf_counter()
    surrogate.gradient(images, labels)
    surrogate.gradient(images, labels)
    return (time.perf_counter() - start) / (2 * PROBE)


def _share_left(step: Step) -> float:
    """Of the time of the whole network: a layer that loses a share of filters at both ends keeps its square."""
    share = 1.0
    for needed in step.walk():
        if needed.kind == "prune":
            share *= (1 - needed.settings["ratio"]) ** 1.5  # small layers compute less efficiently
    return share
