"""How networks are trained: as in the paper, or in as many epochs by our own recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from toolkit.config import TrainConfig

ProtocolName = Literal["paper", "fast"]
Objective = Literal["standard", "adversarial", "distill"]
Stage = Literal["base", "after_pruning", "with_quantisation", "with_rounding"]
PAPER_SGD: Mapping[str, Any] = {
    "batch_size": 64,
    "learning_rate": 0.1,
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": "stepped",
    "ema": 0.0,
    "keep": "last",
}
"""Mini-batch gradient descent at 0.1, from the fifth epoch on at 0.01."""
FAST_SGD: Mapping[str, Any] = {
    "batch_size": 128,
    "learning_rate": 0.05,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "schedule": "one-cycle",
    "ema": 0.999,
    "keep": "best",
}
"""What `toolkit train` and `harden` do unless told otherwise, stated in full, so that a protocol stays what it is."""
QUANTISER_SGD: Mapping[str, Any] = {"learning_rate": 0.01, "momentum": 0.9}
"""Of everything that the paper trains under its quantiser."""
PAPER_STEPS = 20
"""PGD steps of the attack in training, which is the one that measures."""


@dataclass(frozen=True)
class Protocol:
    """The settings of every training, by what it is for."""

    name: ProtocolName
    base: Mapping[str, Any]
    """Of networks from scratch."""
    after_pruning: Mapping[str, Any]
    """Of fine-tuning, of pruned networks and of whole ones."""
    with_quantisation: Mapping[str, Any]
    """Of fine-tuning before quantisation, while the ranges of activations are recorded."""
    with_rounding: Mapping[str, Any]
    """Of quantisation-aware training."""
    attack: Mapping[str, Any]
    """What adversarial objectives add."""
    prunes: Literal["convolutions", "all"]
    """Which layers lose filters: convolutions alone, or hidden linear layers too."""
    qat_per_channel: bool
    """Whether quantisation-aware training rounds weights with a scale for every output channel, or one for all."""
    qat_extremes: bool
    """Whether its ranges of activations span all values, as those of the paper's library do."""
    holds_out: bool
    """Whether some training images are held out and choose the epoch; otherwise all are trained on."""

    def training(self, stage: Stage, objective: str) -> TrainConfig:
        """The configuration of one training."""
        attack = self.attack if objective != "standard" else {}
        return TrainConfig.model_validate({**getattr(self, stage), **attack, "objective": objective})


BASE_EPOCHS, TUNING_EPOCHS = 20, 3
PROTOCOLS: Mapping[ProtocolName, Protocol] = {
    "paper": Protocol(
        "paper",
        base={**PAPER_SGD, "epochs": BASE_EPOCHS},
        after_pruning={**PAPER_SGD, "epochs": TUNING_EPOCHS},
        with_quantisation={**PAPER_SGD, "epochs": TUNING_EPOCHS, **QUANTISER_SGD},
        with_rounding={**PAPER_SGD, "epochs": BASE_EPOCHS, **QUANTISER_SGD, "schedule": "constant", "qat_from": 0.0},
        attack={"attack_steps": PAPER_STEPS, "attack_schedule": "threat"},
        prunes="convolutions",
        qat_per_channel=False,
        qat_extremes=True,
        holds_out=False,
    ),
    "fast": Protocol(
        "fast",
        base={**FAST_SGD, "epochs": BASE_EPOCHS},
        after_pruning={**FAST_SGD, "epochs": TUNING_EPOCHS},
        with_quantisation={**FAST_SGD, "epochs": TUNING_EPOCHS},
        with_rounding={**FAST_SGD, "epochs": BASE_EPOCHS, **QUANTISER_SGD},
        attack={"attack_steps": 2, "attack_schedule": "crossing"},
        prunes="all",
        qat_per_channel=True,
        qat_extremes=False,
        holds_out=True,
    ),
}


@dataclass(frozen=True)
class Experiment:
    """What the paper did with a data set."""

    data: str
    title: str
    network: str
    pruned: float
    """The chosen share of the filters of every layer."""
    pretraining: int | None
    """Epochs of the standard network, where they are not those of the protocol; the robust one then starts from it."""
    training_share: float
    """Of the training images, those that train under the paper's protocol: its code holds out a fifth of CIFAR-10."""
    l2: float
    """Radius in l2, in pixels; ours."""
    images: tuple[int, int]
    """For training and for testing."""


FASHION_MNIST = Experiment("fashion-mnist", "Fashion-MNIST", "cnn8", 0.8, None, 1.0, l2=1.0, images=(60_000, 10_000))
CIFAR10 = Experiment("cifar10", "CIFAR-10", "resnet18", 0.5, 300, 0.8, l2=0.5, images=(50_000, 10_000))
EXPERIMENTS: Mapping[str, Experiment] = {"fashion-mnist": FASHION_MNIST, "cifar10": CIFAR10}
"""By the key of the data set's presets of threat models; the embedded sample has those of Fashion-MNIST."""
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BITS = (16, 8, 4, 2, 1)
