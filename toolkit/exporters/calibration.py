"""Calibration images for onnxruntime.quantization: streamed from a split in batches of one size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from onnxruntime.quantization import CalibrationDataReader
from torch import Tensor

from toolkit.artifacts import Batch, Int64Array, Split
from toolkit.attacks.planned import PlannedAttack
from toolkit.errors import ToolkitError
from toolkit.progress import Task

MAX_BATCH = 64
MAX_BATCH_BYTES = 2**27
"""What the activations of one batch may take."""


def calibration_batch(image_bytes: int) -> int:
    """Images per calibration run, of which each takes so much memory with its activations."""
    return int(np.clip(MAX_BATCH_BYTES // max(image_bytes, 1), 1, MAX_BATCH))


@dataclass(frozen=True)
class AdversarialShare:
    """A share of the calibration images, evenly spread, comes attacked: made when it is read, and never kept."""

    attack: PlannedAttack
    share: float
    """In [0, 1]."""

    def chosen(self, start: int, count: int) -> Int64Array:
        """Which of the `count` images from position `start` on come attacked; the positions are within the batch."""
        reached = np.floor(self.share * np.arange(start, start + count + 1) + 1e-9)
        found: Int64Array = np.flatnonzero(np.diff(reached)).astype(np.int64)
        return found

    def apply(self, batch: Batch, start: int) -> Tensor:
        """The images of the batch that begins at position `start`, float32 [n, C, H, W]; those chosen are attacked."""
        rows = self.chosen(start, len(batch))
        if not len(rows):
            return batch.images
        images = batch.images.clone()
        images[rows] = self.attack.attack(Batch(batch.images[rows], batch.labels[rows]), start)
        return images


class CalibrationReader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Gives the images of a split batch by batch; for onnxruntime's own calibrators use `CalibStridedMinMax=1`.

    The stride makes onnxruntime reduce each batch to its ranges before it asks for the next, so that memory does not
    grow with the number of images. (`CalibMaxIntermediateOutputs` is no substitute: it drops the batches it clears.)

    Args:
        split: the calibration images.
        input_name: the graph's input.
        margin: pixels by which attacked images may leave [0, 1]. If there are any, every batch comes a second time with
            its contrast stretched over [-margin, 1 + margin], so that activations behind the input have room as well.
        batch_size: images per batch; the last one may hold fewer.
        whole_batches: the graph takes `batch_size` images and no fewer; a remainder is left out.
        adversarial: the share of images that comes attacked.

    Raises:
        ToolkitError: the split is empty, or has too few images for one whole batch.
    """

    def __init__(
        self,
        split: Split,
        input_name: str,
        *,
        margin: float = 0.0,
        batch_size: int = MAX_BATCH,
        whole_batches: bool = False,
        adversarial: AdversarialShare | None = None,
    ) -> None:
        least = batch_size if whole_batches else 1
        if len(split) < least:
            raise ToolkitError(
                "there are no calibration images" if not len(split) else "there are too few calibration images",
                found=f"{len(split)}, where the graph takes {least if whole_batches else 'any number'} at a time",
                fix="raise --calibration",
            )
        self._split, self._input_name, self._margin = split, input_name, margin
        self._adversarial = adversarial
        self._task: Task | None = None
        self.batch_size = batch_size
        self.images = len(split) // least * least
        """How many images all batches hold, each counted once."""
        self._next, self._end = 0, len(self)

    def __len__(self) -> int:
        """The number of batches, stretched ones included."""
        return self._plain * (2 if self._margin > 0 else 1)

    @property
    def _plain(self) -> int:
        return -(-self.images // self.batch_size)

    @property
    def adversarial_images(self) -> int:
        """How many of the images come attacked."""
        return 0 if self._adversarial is None else len(self._adversarial.chosen(0, self.images))

    def report_to(self, task: Task) -> None:
        """Advance `task` by one per batch."""
        self._task = task

    def rewind(self) -> None:
        """Begin again with the first batch; the same images come again, attacked ones included."""
        self.set_range(0, len(self))

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        if self._next >= self._end:
            return None
        stretched, position = divmod(self._next, self._plain)
        start = position * self.batch_size
        self._next += 1
        batch = self._split.take(np.arange(start, min(start + self.batch_size, self.images), dtype=np.int64))
        if stretched:
            images = batch.images * (1 + 2 * self._margin) - self._margin
        else:
            images = batch.images if self._adversarial is None else self._adversarial.apply(batch, start)
        if self._task is not None:
            self._task.advance()
        return {self._input_name: images.numpy()}
