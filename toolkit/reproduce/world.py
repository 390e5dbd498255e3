"""The images of a reproduction, divided as its protocol wants."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from toolkit.artifacts import Split, Splits
from toolkit.config import DataConfig
from toolkit.data.sources import DataSource, load_source
from toolkit.data.splits import make_splits
from toolkit.errors import ToolkitError
from toolkit.reproduce.protocol import EXPERIMENTS, Experiment, Protocol

TRAIN_STREAM = 7
"""Apart from the seeds of the splits."""


@dataclass(frozen=True)
class World:
    """A data set, and what the paper did with it."""

    source: DataSource
    experiment: Experiment
    config: DataConfig
    protocol: Protocol

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.train.class_names

    @property
    def has_the_papers_images(self) -> bool:
        """Whether these are the images that the paper's numbers are of, or as many from files of the same classes."""
        return self.config.evaluation is None and (self.source.name == self.experiment.data or self.is_from_files)

    @property
    def is_from_files(self) -> bool:
        """Whether the data set's images lie in a folder, where their format may have changed them a little."""
        counts = tuple(len(part.labels) for part in (self.source.train, self.source.evaluation))
        return self.source.name.startswith("folder:") and counts == self.experiment.images

    def splits(self, seed: int) -> Splits:
        """Under the protocol `paper` all training images are trained on, or the share that its code trains on.

        Calibration and validation images are then among them; they choose nothing there.
        """
        splits = make_splits(self.source, self.config, seed)
        if self.protocol.holds_out:
            return splits
        count = len(self.source.train.labels)
        order = np.random.default_rng([seed, TRAIN_STREAM]).permutation(count).astype(np.int64)
        chosen = np.sort(order[: round(self.experiment.training_share * count)])
        return replace(splits, train=Split(self.source.train, chosen))


def open_world(config: DataConfig, protocol: Protocol) -> World:
    """Load a data set.

    Raises:
        ToolkitError: it is not there, or the paper's threat model has no radius for it.
    """
    source = load_source(config)
    experiment = EXPERIMENTS.get(source.threat_key or "")
    if experiment is None:
        raise ToolkitError(
            "the paper's experiments have no radius for this data set",
            found=f"--data {source.name}",
            fix="choose fashion-mnist, cifar10 or sample",
        )
    return World(source, experiment, config, protocol)
