"""Make the embedded sample of Fashion-MNIST from Debian's package `dataset-fashion-mnist`.

    python benchmarks/make_sample.py [OUTPUT.npz]

The same command gives the same arrays. The hold-out of the sample (a tenth of its training part, the images of smallest
hash) lies within the hold-out of the full data set, so a network trained on the one can be judged on the other.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from toolkit.artifacts import Int64Array
from toolkit.config import DataConfig
from toolkit.data.sources import SAMPLE, DataSource, load_source

SEED = 0
TRAIN_PER_CLASS, HELD_OUT_PER_CLASS, TEST_PER_CLASS = 1_000, 100, 200


def choose(labels: Int64Array, candidates: Int64Array, per_class: int, rng: np.random.Generator) -> Int64Array:
    """`per_class` random positions of every class among `candidates`, ascending."""
    chosen = [rng.choice(candidates[labels[candidates] == code], per_class, replace=False) for code in range(10)]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def train_positions(source: DataSource, rng: np.random.Generator) -> tuple[Int64Array, Int64Array]:
    """Positions of the sample's training images, and of those among them that the full data set holds out."""
    unique, first = np.unique(source.train.hashes, return_index=True)
    first = first[~np.isin(unique, source.evaluation.hashes)].astype(np.int64)
    held_out = choose(source.train.labels, first[: source.holdout], HELD_OUT_PER_CLASS, rng)
    rest = choose(source.train.labels, first[source.holdout :], TRAIN_PER_CLASS - HELD_OUT_PER_CLASS, rng)
    return np.sort(np.concatenate([held_out, rest])), held_out


def make_sample(output: Path) -> None:
    """Write the sample to `output`."""
    source = load_source(DataConfig(source="fashion-mnist"))
    rng = np.random.default_rng(SEED)
    train, held_out = train_positions(source, rng)
    distinct = np.unique(source.evaluation.hashes, return_index=True)[1].astype(np.int64)
    test = choose(source.evaluation.labels, distinct, TEST_PER_CLASS, rng)
    np.savez_compressed(
        output,
        x_train=source.train.pixels(train)[:, 0],
        y_train=source.train.labels[train].astype(np.uint8),
        x_test=source.evaluation.pixels(test)[:, 0],
        y_test=source.evaluation.labels[test].astype(np.uint8),
        class_names=np.array(source.train.class_names),
        held_out=np.isin(train, held_out),
    )
    print(f"{output.name}: {len(train)} training and {len(test)} test images, {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    make_sample(Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLE)
