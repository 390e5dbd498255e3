"""Disjoint parts of a data set, by the contents of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from toolkit import progress
from toolkit.artifacts import HashArray, ImageSet, Int64Array, Split, Splits
from toolkit.config import DataConfig
from toolkit.data.sources import DataSource
from toolkit.errors import ToolkitError


def make_splits(source: DataSource, config: DataConfig, seed: int) -> Splits:
    """Divide `source` into train, calibration, validation and evaluation, no two of which share an image.

    Evaluation is the test part, or a class-stratified choice of `config.evaluation` images of it. Held out from
    training are the `source.holdout` distinct training images of smallest hash: whether an image is held out depends
    on no seed and on no order, so networks trained at different times never saw it. Where the number of images changes
    the last ones held out change too: see `without_seen`.
    Calibration is a seeded choice of `config.calibration` held-out images (at most half of them, with a notice),
    validation the rest. The choice of evaluation images is drawn apart from it: no part depends on another's size.
    Images of evaluation, calibration and validation stand in order of their hashes, so that the first n are a fair
    choice even of a folder that lists one class after the other.

    Raises:
        ToolkitError: fewer than two classes, more evaluation images asked for than there are, or an empty part.
    """
    _check_classes(source)
    evaluation = _evaluation(source.evaluation, config.evaluation, np.random.default_rng([seed, 1]))
    hashes = source.train.hashes
    unique, first = np.unique(hashes, return_index=True)
    fresh = ~np.isin(unique, source.evaluation.hashes)
    unique, first = unique[fresh], first[fresh].astype(np.int64)
    held_out = first[: source.holdout]
    calibrating = min(config.calibration, len(held_out) // 2)
    chosen = np.zeros(len(held_out), dtype=bool)
    chosen[np.random.default_rng(seed).permutation(len(held_out))[:calibrating]] = True
    train = np.flatnonzero(np.isin(hashes, unique[source.holdout :])).astype(np.int64)
    parts = {"train": train, "calibration": held_out[chosen], "validation": held_out[~chosen]}
    _check_filled(source, {**parts, "evaluation": evaluation})
    if calibrating < config.calibration:
        progress.notice(
            f"calibration takes {calibrating} images, not {config.calibration}: half of the {len(held_out)} held out "
            "from training, the other half validates"
        )
    dropped = len(hashes) - len(train) - len(held_out)
    within = {name: Split(source.train, indices) for name, indices in parts.items()}
    return Splits(**within, evaluation=Split(source.evaluation, evaluation), dropped=dropped)


def _check_classes(source: DataSource) -> None:
    for images, part in ((source.train, "training"), (source.evaluation, "test")):
        present = np.unique(images.labels)
        if len(present) < 2:
            name = source.train.class_names[int(present[0])] if len(present) else "none"
            raise ToolkitError(
                f"the {part} images of {source.name} are of fewer than two classes",
                found=f"{len(images.labels)} images, class {name}",
                fix="give images of at least two classes, one folder (or label) per class",
            )
    untested = np.setdiff1d(source.train.labels, source.evaluation.labels)
    if len(untested):
        names = ", ".join(source.train.class_names[int(label)] for label in untested[:5])
        more = f" and {len(untested) - 5} more" if len(untested) > 5 else ""
        progress.warn(f"no test image is of class {names}{more}: no figure tells how well that is classified")


def _evaluation(images: ImageSet, count: int | None, rng: np.random.Generator) -> Int64Array:
    total = len(images.labels)
    if count is not None and count > total:
        raise ToolkitError(
            "more evaluation images are asked for than there are",
            found=f"--n {count}, and {total} images in the test part",
            fix=f"give --n at most {total}, or leave it away for all of them",
        )
    chosen = np.arange(total, dtype=np.int64) if count is None else stratified(images.labels, count, rng)
    order = np.argsort(images.hashes[chosen], kind="stable")
    return chosen[order]


def stratified(labels: Int64Array, count: int, rng: np.random.Generator) -> Int64Array:
    """`count` random positions in `labels` whose class shares are those of all labels, to within one image."""
    order = rng.permutation(len(labels))
    _, codes, sizes = np.unique(labels[order], return_inverse=True, return_counts=True)
    quota = count * sizes / len(labels)
    # Rank within the class, scaled by the class size: the smallest `count` take the quota of every class in turn.
    by_class = np.argsort(codes, kind="stable")
    rank = np.empty(len(labels))
    rank[by_class] = np.concatenate([np.arange(size) for size in sizes])
    certain = rank < np.floor(quota)[codes]
    remainder = (quota - np.floor(quota))[codes]
    next_in_line = rank == np.floor(quota)[codes]
    extra = np.flatnonzero(next_in_line)[np.argsort(-remainder[next_in_line], kind="stable")]
    kept = np.concatenate([np.flatnonzero(certain), extra[: count - int(certain.sum())]])
    return np.sort(order[kept]).astype(np.int64)


def _check_filled(source: DataSource, parts: dict[str, Int64Array]) -> None:
    empty = [name for name, indices in parts.items() if not len(indices)]
    if empty:
        counts = f"{len(source.train.labels)} training images, {len(np.unique(source.train.hashes))} of them distinct"
        raise ToolkitError(
            f"no images are left for {' and '.join(empty)}",
            found=f"{counts}, and {len(source.evaluation.labels)} test images in {source.name}",
            fix="give more images; those of train that also stand in the test part, or twice, do not count",
        )


MOST_SEEN = 0.1
"""Share of a held-out part that a network may have been trained on, if it is left out."""
JUDGING = ("calibration", "validation", "evaluation")
"""Parts that no training may see."""


def without_seen(splits: Splits, hashes: HashArray) -> Splits:
    """Leave out of calibration and validation the few images that trained a network when the data were fewer, or more.

    A part of which more than a tenth was seen stays as it is, to be refused by `check_trained_on`; so does evaluation.

    Args:
        splits: the parts in use.
        hashes: of all images that the network was ever trained on; empty if unknown.
    """

    def unseen(part: Split, name: str) -> Split:
        fresh = ~np.isin(part.hashes, hashes)
        seen = len(part) - int(fresh.sum())
        if not 0 < seen <= MOST_SEEN * len(part):
            return part
        progress.notice(f"{seen} of {len(part)} {name} images trained the checkpoint, and are left out")
        return Split(part.images, part.indices[fresh])

    calibration, validation = unseen(splits.calibration, "calibration"), unseen(splits.validation, "validation")
    return replace(splits, calibration=calibration, validation=validation)


def check_trained_on(
    splits: Splits, hashes: HashArray, network: str = "checkpoint", judging: Sequence[str] = JUDGING
) -> None:
    """Check that no image which judges a network was among those that trained it.

    Copies are known by their pixels. A notice says when the data set holds none of the images that trained the network:
    the check then rests on their being another data set's, and not the same ones compressed with loss or resized.

    Args:
        splits: the parts in use.
        hashes: of all images that the network was ever trained on; empty if unknown.
        network: what messages call it.
        judging: the parts that must not be among them.

    Raises:
        ToolkitError: images of these parts are among them.
    """
    parts: dict[str, Split] = {name: getattr(splits, name) for name in judging}
    seen = {name: int(np.isin(part.hashes, hashes).sum()) for name, part in parts.items()}
    if len(hashes) and not any(seen.values()) and not np.isin(splits.train.hashes, hashes).any():
        progress.notice(
            f"none of the {len(hashes)} images that trained the {network} is in {splits.train.images.name}: if it is "
            "the same data set in another form (resized, JPEG), images that trained it may judge it unnoticed"
        )
    if any(seen.values()):
        raise ToolkitError(
            f"the {network} was trained on images that are to judge it",
            found=", ".join(f"{count} of {len(parts[name])} {name} images" for name, count in seen.items() if count)
            + " are among its training images",
            fix="use the data set and the parts that it was trained on (--data), or test images that it never saw",
        )
