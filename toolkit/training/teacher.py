"""A teacher's soft labels: made once for all images where they stay the same, else batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.artifacts import Int64Array, ModelSpec, Split, TorchModel, weights_digest
from toolkit.attacks.forms import Precision
from toolkit.attacks.surrogate import Surrogate
from toolkit.errors import ToolkitError
from toolkit.progress import task

KEPT_LABELS = 2**26
"""At most so many soft labels (images times classes) are kept in memory: 256 MB."""


def check_teacher(theirs: ModelSpec, ours: ModelSpec) -> None:
    """Check that the teacher of spec `theirs` can label the images of the student of spec `ours`.

    Raises:
        ToolkitError: other classes, or another shape of images.
    """
    if theirs.class_names != ours.class_names:
        first = next(
            (f"'{a}' and '{b}'" for a, b in zip(theirs.class_names, ours.class_names, strict=False) if a != b),
            f"the first {min(len(theirs.class_names), len(ours.class_names))} are equal",
        )
        raise ToolkitError(
            "teacher and student know other classes",
            found=f"{len(theirs.class_names)} and {len(ours.class_names)} classes; {first}",
            fix="pass a --teacher that was trained on the same data set",
        )
    if theirs.input_shape != ours.input_shape:
        raise ToolkitError(
            "teacher and student take images of other shapes",
            found=f"{list(theirs.input_shape)} and {list(ours.input_shape)}",
            fix="pass a --teacher that was trained on images of the same size and channels",
        )


class Teacher:
    """Labels images by a network that does not change.

    Args:
        model: the teacher.
        precision: in which it is to run.
    """

    def __init__(self, model: TorchModel, precision: Precision) -> None:
        self._surrogate = Surrogate(
            model.module, model.spec.normalization, precision, input_shape=model.spec.input_shape
        )
        self.training_hashes = model.training_hashes
        self._classes = len(model.spec.class_names)
        self._kept: Tensor | None = None
        self.digest = weights_digest(model.network)

    def keep_labels(self, split: Split) -> None:
        """Label all images of `split` once, always in the same batches, unless that would take too much memory."""
        if len(split) * self._classes > KEPT_LABELS:
            return
        labels = []
        with task("soft labels of the teacher", len(split)) as bar:
            for batch in split.batches():
                labels.append(self.logits(batch.images).cpu())
                bar.advance(len(batch))
        self._kept = torch.cat(labels)

    def kept(self, positions: Int64Array) -> Tensor | None:
        """Logits float32 [n, classes] of the images at `positions` of the split whose labels are kept, if any are."""
        return None if self._kept is None else self._kept[torch.from_numpy(positions)]

    def logits(self, images: Tensor) -> Tensor:
        """Logits float32 [n, classes] of images float32 [n, C, H, W] in [0, 1].

        Raises:
            ToolkitError: they are no numbers.
        """
        logits = self._surrogate.logits(images)
        if not bool(logits.isfinite().all()):
            raise ToolkitError(
                "the teacher gives logits that are no numbers",
                found=f"{int((~logits.isfinite()).sum())} of {logits.numel()} logits",
                fix="pass another --teacher, or --train-precision float32",
            )
        return logits
