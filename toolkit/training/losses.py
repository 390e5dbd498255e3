"""Training objectives: each turns a batch into the loss to descend."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional

Forward = Callable[[Tensor], Tensor]
"""Pixels to logits, with the weights in training."""
Adversary = Callable[[Tensor, Tensor], Tensor]
"""Images and labels to attacked images, made on the current weights."""
Objective = Callable[[Forward, Tensor, Tensor, Adversary], Tensor]


def standard_loss(forward: Forward, images: Tensor, labels: Tensor, _adversary: Adversary) -> Tensor:
    """Mean cross-entropy on clean images."""
    return functional.cross_entropy(forward(images), labels)


def adversarial_loss(forward: Forward, images: Tensor, labels: Tensor, adversary: Adversary) -> Tensor:
    """Mean cross-entropy on attacked images alone (Madry et al. 2018)."""
    return functional.cross_entropy(forward(adversary(images, labels)), labels)


OBJECTIVES: Mapping[str, Objective] = {"standard": standard_loss, "adversarial": adversarial_loss}
