"""What attacks that look for the smallest perturbation have in common: the closest points found, and who judges them.

A point on the surrogate's boundary seldom fools another graph. What is judged by the graph that counts is therefore the
direction that was found, at the full radius of the threat model, and only then the point itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from toolkit.attacks.boundary import Box
from toolkit.attacks.pgd import constrain
from toolkit.attacks.projections import NORM
from toolkit.attacks.surrogate import Surrogate
from toolkit.attacks.survivors import Settle, Survivors, both
from toolkit.attacks.threat import ThreatModel
from toolkit.errors import ToolkitError

SUBMIT_EVERY = 10
"""Steps after which points closer than those last judged are judged too."""


@dataclass(frozen=True, slots=True)
class MinimumNorm:
    """Result of a minimum-norm attack on n images; on those that were settled, the search ended there."""

    attacked: Tensor
    """Within the threat model, float32 [n, C, H, W]: what an evaluation scores. The images themselves where nothing
    was found."""
    closest: Tensor
    """The closest points found that fool the surrogate, whatever their distance, float32 [n, C, H, W]."""
    norms: Tensor
    """Of the perturbations to `closest`, in units of the ball, float32 [n]; inf where none was found, 0 where the
    surrogate is wrong about the image itself and nobody judges."""

    @property
    def found(self) -> Tensor:
        """Which images have a point that fools the surrogate, bool [n]."""
        return self.norms.isfinite()


class Search:
    """Keeps the closest points of a batch that fool the surrogate, and which images are still attacked.

    Args:
        surrogate: that is to be fooled.
        images: float32 [n, C, H, W] in [0, 1].
        labels: int64 [n], the true classes.
        threat: norm, space and clipping of the search; its radius matters only to what is judged and returned.
        settle: ends the attack on images that fool the graph that counts; None: all images are attacked to the end.
    """

    def __init__(
        self, surrogate: Surrogate, images: Tensor, labels: Tensor, threat: ThreatModel, settle: Settle | None
    ) -> None:
        self.images, self.labels = images.to(surrogate.device), labels.to(surrogate.device)
        self.threat = threat
        self.scale = threat.pixel_scale(surrogate.normalization).to(surrogate.device)
        self._surrogate = surrogate
        self._survivors = Survivors(self.images, settle)
        self._closest = self.images.clone()
        self._norms = torch.full((len(images),), torch.inf, device=surrogate.device)
        self._judged = torch.full_like(self._norms, torch.inf)
        self.logits = surrogate.logits(self.images)
        """Of the images themselves, float32 [n, classes]."""
        if settle is None:  # else points farther away are wanted too: the graph that counts may be right about them
            self.record(self.images, self.logits.argmax(dim=1) != self.labels)

    def __len__(self) -> int:
        return len(self._survivors)

    @property
    def positions(self) -> Tensor:
        """Of the images still attacked within the batch, int64 [m]."""
        return self._survivors.positions

    @property
    def norms(self) -> Tensor:
        """Of the smallest perturbations found, one per image still attacked, float32 [m]; inf for none."""
        return self._norms[self.positions]

    def size(self, points: Tensor) -> Tensor:
        """The norms of perturbations to `points`, one per image still attacked, in units of the ball, float32 [m]."""
        return NORM[self.threat.norm]((points - self.images[self.positions]) / self.scale)

    def clip(self, points: Tensor) -> Tensor:
        """`points` in the pixel range, if the threat model has one."""
        return points.clamp(0.0, 1.0) if self.threat.clip else points

    def box(self) -> Box | None:
        """How far every pixel of the images still attacked may move, in units of the ball, [m, d]."""
        if not self.threat.clip:
            return None
        images = self.images[self.positions]
        return Box((-images / self.scale).flatten(1), ((1.0 - images) / self.scale).flatten(1))

    def record(self, points: Tensor, fooled: Tensor) -> None:
        """Keep those of `points`, one per image still attacked, that fool the surrogate and are the closest so far."""
        norms = self.size(points)
        better = fooled & (norms < self.norms)
        rows = self.positions[better]
        self._closest[rows] = points[better]
        self._norms[rows] = norms[better]

    def settle(self, *, everything: bool) -> Tensor | None:
        """Have what was found within the radius judged: an image's first such point, or any closer one.

        Args:
            everything: judge whatever is closer than what was last judged, not first points alone.

        Returns:
            Which of the images still attacked remain, bool [m]; None if all do.
        """
        norms, judged = self.norms, self._judged[self.positions]
        waiting = (norms <= self.threat.eps) & (norms < judged)
        if not everything:
            waiting &= judged.isinf()
        self._judged[self.positions[waiting]] = norms[waiting]
        return self._submit(waiting)

    def leave(self, hopeless: Tensor) -> Tensor | None:
        """Have what was found of these images judged, and attack them no more.

        Args:
            hopeless: bool [m], of the images still attacked.

        Returns:
            As `settle` does.
        """
        first = self._submit(hopeless & self.norms.isfinite())
        left = hopeless if first is None else hopeless[first]
        return both(first, self._survivors.leave(self._exact(), left))

    def finish(self) -> MinimumNorm:
        """Judge what is left, and give the result."""
        self.settle(everything=True)
        # beyond the radius nothing is known to fool the surrogate; the graph that counts may differ
        self._submit(self.norms.isfinite() & (self.norms > self.threat.eps))
        stretched, exact = self._stretched(), self._exact()
        if len(self):
            wrong = self._surrogate.logits(stretched).argmax(dim=1) != self.labels[self.positions]
            exact = torch.where(wrong.view(-1, 1, 1, 1), stretched, exact)
        return MinimumNorm(self._survivors.finish(exact), self._closest, self._norms)

    def _submit(self, waiting: Tensor) -> Tensor | None:
        """Have the stretched points judged, then the exact ones of the images that remain."""
        first = self._survivors.submit(self._stretched(), waiting)
        left = waiting if first is None else waiting[first]
        return both(first, self._survivors.submit(self._exact(), left))

    def _exact(self) -> Tensor:
        images = self.images[self.positions]
        return constrain(self._closest[self.positions], images, self.threat, self.scale)

    def _stretched(self) -> Tensor:
        """The directions found, at the full radius; images with none as they are."""
        images, norms = self.images[self.positions], self.norms
        usable = norms.isfinite() & (norms > 0)
        factor = torch.where(usable, self.threat.eps / torch.where(usable, norms, 1.0), 0.0)
        perturbation = factor.view(-1, 1, 1, 1) * (self._closest[self.positions] - images)
        return constrain(images + perturbation, images, self.threat, self.scale)


def require_norm(attack: str, threat: ThreatModel, norms: Sequence[str]) -> None:
    """Refuse a threat model for which an attack is not defined.

    Raises:
        ToolkitError: the norm is none of `norms`.
    """
    if threat.norm not in norms:
        raise ToolkitError(
            f"{attack} is not defined for {threat.norm}",
            found=f"--norm {threat.norm}",
            fix=f"use it with --norm {' or '.join(norms)}, or take FAB or FMN, which have every norm",
        )
