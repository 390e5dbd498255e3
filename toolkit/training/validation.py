"""Accuracy of a network in training on the validation part, clean and attacked."""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.artifacts import Normalized, Proportion, Split
from toolkit.attacks.surrogate import compute_device
from toolkit.training.adversary import Adversary, TrainingAttack
from toolkit.training.losses import cross_entropy_of


def measure(
    module: Normalized,
    split: Split,
    adversary: Adversary | None,
    attacks: tuple[TrainingAttack, ...],
    seed: int,
) -> tuple[Proportion, ...]:
    """Clean accuracy on `split`, then accuracy under each of `attacks`; `module` is left in evaluation mode.

    Args:
        module: on the device where training runs.
        split: the images, all of which are attacked.
        adversary: what attacks; only needed for `attacks`.
        attacks: none, or several.
        seed: of the random starts.
    """
    module.eval()
    generator = torch.Generator().manual_seed(seed)
    flags: list[list[Tensor]] = [[] for _ in range(1 + len(attacks))]
    for batch in split.batches():
        images, labels = batch.images.to(compute_device()), batch.labels.to(compute_device())
        flags[0].append(_correct(module, images, labels))
        for attack, found in zip(attacks, flags[1:], strict=True):
            if adversary is None:
                raise ValueError("attacks need an adversary")
            attacked = adversary.attack(module, images, cross_entropy_of(labels), attack, generator)
            found.append(_correct(module, attacked, labels))
    return tuple(Proportion.of(torch.cat(found)) for found in flags)


def _correct(module: Normalized, images: Tensor, labels: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = module(images)
    return logits.argmax(dim=1).eq(labels).cpu()
