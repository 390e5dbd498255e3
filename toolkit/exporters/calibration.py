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
MIN_BATCH = 16
"""Below this a divisor of the number of images is not worth its many small runs; the remainder is left out instead."""
MAX_BATCH_PIXELS = 2**21
"""The percentile method holds all activations of a batch at once; large images come in smaller batches."""


def calibration_batch(images: int, pixels: int) -> int:
    """Images per calibration run: the histograms need batches of one size, best a divisor of `images`.

    Args:
        images: how many there are; at least 1.
        pixels: values in one image (channels times height times width).
    """
    largest = max(1, min(MAX_BATCH, MAX_BATCH_PIXELS // pixels, images))
    divisor = max(size for size in range(1, largest + 1) if images % size == 0)
    return divisor if divisor >= min(MIN_BATCH, largest) else largest


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
    """Gives the images of a split batch by batch, for `CalibStridedMinMax=1`.

    The stride makes onnxruntime reduce each batch to its ranges before it asks for the next, so that memory does not
    grow with the number of images. (`CalibMaxIntermediateOutputs` is no substitute: it drops the batches it clears.)

    Args:
        split: the calibration images.
        input_name: the graph's input.
        margin: pixels by which attacked images may leave [0, 1]. If there are any, every batch comes a second time with
            its contrast stretched over [-margin, 1 + margin], so that activations behind the input have room as well.
        batch_size: where the graph takes batches of one size only.
        adversarial: the share of images that comes attacked.

    Raises:
        ToolkitError: the split is empty.
    """

    def __init__(
        self,
        split: Split,
        input_name: str,
        *,
        margin: float = 0.0,
        batch_size: int | None = None,
        adversarial: AdversarialShare | None = None,
    ) -> None:
        if len(split) < (batch_size or 1):
            raise ToolkitError(
                "there are no calibration images" if not len(split) else "there are too few calibration images",
                found=f"{len(split)}, where the graph takes {batch_size or 'any number'} at a time",
                fix="raise --calibration",
            )
        self._split, self._input_name, self._margin = split, input_name, margin
        self._adversarial = adversarial
        self._task: Task | None = None
        self.batch_size = batch_size or calibration_batch(len(split), int(np.prod(split.images.shape)))
        self._next, self._end = 0, len(self)

    def __len__(self) -> int:
        """The number of batches, stretched ones included."""
        return self._plain * (2 if self._margin > 0 else 1)

    @property
    def _plain(self) -> int:
        return len(self._split) // self.batch_size

    @property
    def images(self) -> int:
        """The number of images in all batches, each counted once."""
        return self._plain * self.batch_size

    @property
    def adversarial_images(self) -> int:
        """How many of these come attacked."""
        return 0 if self._adversarial is None else len(self._adversarial.chosen(0, self.images))

    def report_to(self, task: Task) -> None:
        """Advance `task` by one per batch."""
        self._task = task

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        if self._next >= self._end:
            return None
        stretched, position = divmod(self._next, self._plain)
        start = position * self.batch_size
        self._next += 1
        batch = self._split.take(np.arange(start, start + self.batch_size, dtype=np.int64))
        if stretched:
            images = batch.images * (1 + 2 * self._margin) - self._margin
        else:
            images = batch.images if self._adversarial is None else self._adversarial.apply(batch, start)
        if self._task is not None:
            self._task.advance()
        return {self._input_name: images.numpy()}
