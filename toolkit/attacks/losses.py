"""The losses that attacks raise: one value per image, above 0 for margins once the image is misclassified."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

LabelLoss = Callable[[Tensor, Tensor], Tensor]
"""Logits float32 [n, classes] and true labels int64 [n] to losses [n]."""
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits, true labels and target classes to losses [n]."""

TINY = 1e-12


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; vanishes in float32 where the network is certain, which is why `dlr` stands beside it."""
    return functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the true class's: positive exactly where the image is misclassified."""
    true = logits.gather(1, labels[:, None])[:, 0]
    return _largest_other(logits, labels) - true


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020): the margin in units of the spread of the leading logits.

    It needs three classes; of two the margin itself is returned.
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    leading = logits.topk(3, dim=1).values
    return margin(logits, labels) / (leading[:, 0] - leading[:, 2] + TINY)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted difference of logits ratio (Croce & Hein 2020): towards one class in place of the nearest.

    It needs four classes; of fewer the plain difference of the two logits is returned.
    """
    difference = logits.gather(1, targets[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]
    if logits.shape[1] < 4:
        return difference
    leading = logits.topk(4, dim=1).values
    return difference / (leading[:, 0] - 0.5 * (leading[:, 2] + leading[:, 3]) + TINY)


def ranked_targets(logits: Tensor, labels: Tensor) -> Tensor:
    """The other classes of every image, the likeliest first, int64 [n, classes - 1]."""
    # a class of minus infinity comes before the true one all the same
    others = logits.nan_to_num(nan=0.0, posinf=torch.inf, neginf=torch.finfo(logits.dtype).min)
    others = others.scatter(1, labels[:, None], -torch.inf)
    return others.argsort(dim=1, descending=True)[:, :-1]


def target_of(logits: Tensor, labels: Tensor, rank: int | Tensor) -> Tensor:
    """Each image's `rank`-th likeliest other class, int64 [n].

    Args:
        logits: [n, classes].
        labels: int64 [n], the true classes.
        rank: 1 for the likeliest other class; below the number of classes. One for all images, or int64 [n].
    """
    ranks = torch.as_tensor(rank, device=logits.device).expand(len(logits))
    return ranked_targets(logits, labels).gather(1, ranks[:, None] - 1)[:, 0]


def _largest_other(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)
