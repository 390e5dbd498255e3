"""A reproduction in small: 8x8 images of ten classes, protocols of one epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from toolkit.artifacts import Normalization
from toolkit.config import DataConfig, ReproduceConfig
from toolkit.data.images import ArrayImages
from toolkit.data.sources import DataSource
from toolkit.data.standard import FASHION_MNIST_CLASSES
from toolkit.models import registry
from toolkit.reproduce import runner, world
from toolkit.reproduce.protocol import PAPER_SGD, PROTOCOLS, Protocol, ProtocolName
from toolkit.reproduce.recipes import Measure, Recipe
from toolkit.reproduce.runner import Runner

TRAIN, TEST = 640, 100
ONE_EPOCH = {**PAPER_SGD, "epochs": 1, "learning_rate": 0.05, "momentum": 0.9, "batch_size": 8}
TUNED = Recipe("standard", 0.8, "adversarial")
ROUNDED = Recipe("standard", tuned="adversarial", form="simulated", tuned_as="with_rounding")
ATTACK = {"attack_steps": 2, "attack_schedule": "threat"}


def protocols() -> dict[ProtocolName, Protocol]:
    short = replace(
        PROTOCOLS["paper"],
        base={**ONE_EPOCH, "epochs": 3},
        after_pruning=ONE_EPOCH,
        with_quantisation=ONE_EPOCH,
        with_rounding={**ONE_EPOCH, "epochs": 3, "learning_rate": 0.01, "qat_from": 0.0},
        attack=ATTACK,
    )
    return {"paper": short, "fast": replace(short, name="fast", holds_out=True, prunes="all", qat_per_channel=True)}


def source(config: DataConfig) -> DataSource:
    """Noise with one brighter row or column a class, under the name that is asked for."""
    rng = np.random.default_rng(0)
    parts = []
    for count in (TRAIN, TEST):
        labels = np.arange(count) % 10
        array = rng.integers(0, 60, (count, 1, 8, 8), dtype=np.uint8)
        for image, label in zip(array, labels, strict=True):
            if label < 5:
                image[:, label] += 190
            else:
                image[:, :, label - 5] += 190
        parts.append(ArrayImages("small", FASHION_MNIST_CLASSES, array, labels))
    half = Normalization((0.5,), (0.5,))
    return DataSource(config.source or "fashion-mnist", parts[0], parts[1], half, 100, "fashion-mnist")


def network(classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """In place of the network of eight layers, which learns nothing within seconds."""
    layers: list[nn.Module] = []
    for before, after, stride in ((shape[0], 10, 1), (10, 20, 2), (20, 20, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(80, 32), nn.ReLU(), nn.Linear(32, classes))


def shrink(set_attribute: Callable[[Any, str, Any], object] = setattr) -> None:
    """Make every data set small, and every training short."""
    set_attribute(world, "load_source", source)
    set_attribute(runner, "PROTOCOLS", protocols())
    set_attribute(registry, "ARCHITECTURES", {**registry.ARCHITECTURES, "cnn8": network})


def settings(work: Path, target: str = "table3", **changes: Any) -> ReproduceConfig:
    values = {"target": target, "seeds": (0,), "threads": 1, "work": work, "attack_images": 20} | changes
    return ReproduceConfig.model_validate(values)


def fill(filling: Runner, recipe: Recipe, measure: Measure = "pgd-paper") -> dict[str, Any]:
    """Do one cell's steps, whatever others there are."""
    panel = filling.panels[0]
    assert panel.world is not None
    planner = panel.planners[0]
    step = planner.measure(recipe, measure)
    for needed in filling.store.missing(step):
        assert filling._do(needed, planner, panel.world), filling.failed
    found = filling.store.result(step)
    assert found is not None
    return found
