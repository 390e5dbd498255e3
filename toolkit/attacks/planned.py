"""The attack of a run's own plan on its float network, repeatable batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.artifacts import Batch, TorchModel, derive_seed
from toolkit.attacks.forms import Precision
from toolkit.attacks.pgd import pgd
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.threat import PgdPlan


class PlannedAttack:
    """PGD of `plan` on `model`; what a batch gets depends on the seed and its position alone, not on what ran before.

    Args:
        model: the surrogate, float32.
        plan: threat model, steps and start.
        seed: of the random starts.
        precision: of the surrogate's gradients.

    Raises:
        ToolkitError: the network gives no gradient.
    """

    def __init__(self, model: TorchModel, plan: PgdPlan, *, seed: int, precision: Precision) -> None:
        spec = model.spec
        self.plan = plan
        self.surrogate = Surrogate(model.module, spec.normalization, precision, input_shape=spec.input_shape)
        self.seed = seed

    def attack(self, batch: Batch, *position: int) -> Tensor:
        """Attacked images float32 [n, C, H, W] on the CPU, all steps on all images.

        Args:
            batch: images in [0, 1] and their true classes.
            position: whole numbers that tell this batch and restart from every other.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, *position))
        return pgd(self.surrogate, batch.images, batch.labels, self.plan, generator).cpu()
