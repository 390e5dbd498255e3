"""The batches of a training: their size, and random changes of their images that keep the class."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from toolkit.artifacts import Int64Array
from toolkit.config import TrainConfig
from toolkit.errors import ToolkitError
from toolkit.progress import notice


def fitting_batch(config: TrainConfig, images: int) -> int:
    """The batch size that `images` training images allow.

    Raises:
        ToolkitError: more was asked for than there are images, and than the default.
    """
    if config.batch_size <= images:
        return config.batch_size
    if config.batch_size > TrainConfig().batch_size:
        raise ToolkitError(
            "the batch is larger than the training data",
            found=f"--batch-size {config.batch_size}, {images} training images",
            fix=f"pass --batch-size {min(images, TrainConfig().batch_size)}",
        )
    notice(f"all {images} training images make one batch: fewer than --batch-size {config.batch_size}")
    return images


def augment(images: Tensor, generator: torch.Generator, *, share: Int64Array | None = None, of: int = 0) -> Tensor:
    """Random horizontal flips and shifts by up to an eighth of the side (zero padding), one draw per image.

    Args:
        images: [N, C, H, W].
        generator: what is drawn with.
        share: the images are these of a batch, and draws are made for the whole of it; None: they are the batch.
        of: images of that batch.
    """
    count, _, height, width = images.shape
    drawn, share = (of, share) if share is not None else (count, np.arange(count))
    reach = max(1, height // 8)
    padded = functional.pad(images, (reach, reach, reach, reach))
    top = torch.randint(0, 2 * reach + 1, (drawn, 1), generator=generator)[share]
    left = torch.randint(0, 2 * reach + 1, (drawn, 1), generator=generator)[share]
    flip = torch.rand((drawn, 1), generator=generator)[share] < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(flip, torch.arange(width - 1, -1, -1), torch.arange(width))
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
