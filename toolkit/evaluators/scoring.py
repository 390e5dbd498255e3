"""Who judges attacked images, and the ledger of what every graph still classifies rightly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from toolkit.artifacts import Int64Array, Normalization, Predictor, Proportion, Split, TorchModel
from toolkit.attacks.losses import margin
from toolkit.attacks.pgd import largest_violation, rounding
from toolkit.attacks.surrogate import compute_device
from toolkit.attacks.threat import ThreatModel
from toolkit.evaluators.accuracy import correct, right
from toolkit.evaluators.image_files import LEVELS, WRITABLE_CHANNELS, Gallery, decode, encode, to_levels

SurrogateName = Literal["original", "float", "fake_quantised", "twin"]
TargetName = Literal["torch", "fp32", "deployed", "deployed_unoptimised"]
Flags = dict[str, Tensor]
"""Which images are classified rightly, bool [n], by the name of the judge; and margins, see `MARGIN`."""

FILE = "file"
"""The judge's name of the graph that counts behind a PNG file of the attacked image."""
MARGIN = "margin of "
"""Beside the flags, under this and a compared graph's name: its margin, float32 [n], positive where it is fooled."""
POINTS, ROWS, HEIGHTS = "points of ", "rows of points of ", "margins of points of "
"""Before a compared graph's name in the ledger's state: attacked images, their rows among the images, their margins."""


def primary_of(targets: Mapping[TargetName, Predictor]) -> TargetName:
    """The graph that counts: the deployed one, where there is one, else the first."""
    return "deployed" if "deployed" in targets else next(iter(targets))


def placed(predictor: Predictor) -> Predictor:
    """`predictor` where it computes fastest: torch networks are copied to the GPU if there is one."""
    device = compute_device()
    if not isinstance(predictor, TorchModel) or predictor.module.mean.device.type == device.type:
        return predictor
    copied = predictor.copy()
    copied.module.to(device)
    return copied


def _takes_levels(target: Predictor) -> bool:
    """Whether a graph takes the 256 levels of image files, not what lies between."""
    return getattr(getattr(target, "interface", None), "dtype", None) == "uint8"


class Judges:
    """The graphs on which attacked images are scored, in float32, and the image files read by the one that counts.

    Args:
        targets: the graphs, by name.
        threat: what an attacker may do; every image that is handed in is measured against it.
        normalization: of the network, for a ball that lies behind it.
        gallery: keeps the files that fool the graph that counts.
        files: whether attacked images are also written to image files and read back.
    """

    def __init__(
        self,
        targets: Mapping[TargetName, Predictor],
        threat: ThreatModel,
        normalization: Normalization,
        gallery: Gallery | None = None,
        *,
        files: bool = True,
    ) -> None:
        self.targets: dict[TargetName, Predictor] = {name: placed(target) for name, target in targets.items()}
        self.primary: TargetName = primary_of(targets)
        """The graph that counts."""
        told: tuple[TargetName, ...] = tuple(name for name in ("fp32", "deployed") if name in targets)
        self.compared: tuple[TargetName, ...] = told if self.primary in told else (self.primary, *told)
        """The graphs whose worst cases are told: an image is attacked for each of them until that one is fooled."""
        self._threat, self._normalization, self._gallery = threat, normalization, gallery or Gallery(None)
        self._files = files

    def score(self, attacked: Tensor, clean: Tensor, labels: Tensor, *, indices: Int64Array, every: bool) -> Flags:
        """Which attacked images are still classified rightly, by judge, the image file among them, and the margins.

        Args:
            attacked: float32 [n, C, H, W] on any device.
            clean: float32 [n, C, H, W] on the CPU, the images they were made from.
            labels: int64 [n] on the CPU.
            indices: their positions among the evaluation images.
            every: on all targets; otherwise on the compared ones alone.

        Raises:
            RuntimeError: an attack left its threat model.
        """
        attacked = attacked.cpu()
        over = largest_violation(attacked, clean, self._threat, self._normalization)
        if not over <= rounding(attacked.shape, self._threat, self._normalization):  # so that NaN is caught too
            raise RuntimeError(f"an attack left its threat model by {over:g}")
        names: Sequence[TargetName] = tuple(self.targets) if every else self.compared
        fed = dict.fromkeys(names, attacked)
        if whole := [name for name in names if _takes_levels(self.targets[name])]:
            # rounded where they are fed, they might end outside of the ball
            levels = to_levels(attacked, clean, self._threat, self._normalization).float() / LEVELS
            fed |= dict.fromkeys(whole, levels)
        logits = {name: self.targets[name].predict(fed[name]).cpu() for name in names}
        flags: Flags = {name: right(found, labels) for name, found in logits.items()}
        flags |= {MARGIN + name: margin(logits[name], labels) for name in self.compared}
        if self._files and attacked.shape[1] in WRITABLE_CHANNELS:
            flags[FILE] = self._score_files(attacked, clean, labels, indices, fooled=~flags[self.primary])
        return flags

    def _score_files(
        self, attacked: Tensor, clean: Tensor, labels: Tensor, indices: Int64Array, fooled: Tensor
    ) -> Tensor:
        """The same behind a PNG file, of those images that fool the graph without one."""
        right = torch.ones(len(attacked), dtype=torch.bool)
        rows = fooled.nonzero()[:, 0]
        if not len(rows):
            return right
        levels = to_levels(attacked[rows], clean[rows], self._threat, self._normalization)
        files = [encode(image) for image in levels]
        right[rows] = correct(self.targets[self.primary], torch.stack([decode(file) for file in files]), labels[rows])
        for row, file in zip(rows.tolist(), files, strict=True):
            if not right[row]:
                self._gallery.keep(file, index=int(indices[row]), label=int(labels[row]))
        return right


class Ledger:
    """Which evaluation images every judge still classifies rightly: clean, and under everything tried so far.

    Args:
        clean: what the judges say of the images themselves.
        judges: the graphs.
        files: whether attacked images are judged behind an image file as well.
        keep_near: keep the best attacked image of each that stands, from this progress on; None: keep none.
    """

    def __init__(
        self, clean: Mapping[str, Tensor], judges: Judges, *, files: bool, keep_near: float | None = None
    ) -> None:
        self.clean: Flags = dict(clean)
        self.graphs: tuple[TargetName, ...] = judges.compared
        self.margins: dict[TargetName, Tensor] = {name: clean[MARGIN + name].clone() for name in self.graphs}
        """The largest margin of every compared graph so far; see `progress`."""
        self.worst: Flags = {name: clean[name].clone() for name in self.graphs}
        self._keep_near = keep_near
        self._points: dict[TargetName, dict[int, tuple[float, Tensor]]] = {name: {} for name in self.graphs}
        """By image: the margin and the attacked image of the nearest point that was kept."""
        self._by_graph: dict[TargetName, tuple[str, ...]] = {name: (name,) for name in self.graphs}
        """The judges that answer for a graph: the one that counts has its files too."""
        if files:
            self.worst[FILE] = clean[judges.primary].clone()
            self._by_graph[judges.primary] = (judges.primary, FILE)

    def update(self, flags: Mapping[str, Tensor], indices: Int64Array, attacked: Tensor | None = None) -> None:
        """Count one more attack on the images at `indices`, where an image may stand more than once."""
        for name, worst in self.worst.items():
            worst[indices[~flags[name].numpy()]] = False
        for name in self.graphs:
            found, largest = flags[MARGIN + name], self.margins[name]
            if attacked is not None:
                self._keep(name, found, indices, attacked)
            with np.errstate(invalid="ignore"):  # logits that are not finite
                np.maximum.at(largest.numpy(), indices, found.numpy())

    def _keep(self, graph: TargetName, margins: Tensor, indices: Int64Array, attacked: Tensor) -> None:
        """Keep what came nearer to the graph's boundary than anything kept before."""
        if self._keep_near is None:
            return
        points, standing = self._points[graph], self.standing(graph)[indices]
        for index in indices[~standing.numpy()].tolist():
            points.pop(index, None)
        near = standing & (self._share(graph, margins, indices) >= self._keep_near)
        for row in near.nonzero()[:, 0].tolist():
            index, height = int(indices[row]), float(margins[row])
            if index not in points or height > points[index][0]:
                points[index] = (height, attacked[row].detach().cpu().clone())

    def nearest(self, graphs: Sequence[TargetName], indices: Int64Array, otherwise: Tensor) -> Tensor:
        """The kept attacked images nearest to the boundary of the first graph that has one, else rows of `otherwise`.

        Args:
            graphs: the most important first; one that an image fools has no point of it.
            indices: positions of the images.
            otherwise: float32 [n, C, H, W], as the result.
        """
        found = []
        for index, image in zip(indices.tolist(), otherwise, strict=True):
            kept = next((self._points[graph][index][1] for graph in graphs if index in self._points[graph]), None)
            found.append(image if kept is None else kept)
        return torch.stack(found)

    def restore(self, known: Mapping[str, npt.NDArray[Any]], indices: Int64Array) -> None:
        """Take over what `state` gave for the images at `indices`."""
        self.update(
            {name: torch.from_numpy(known[name]) for name in (*self.worst, *map(_margin, self.graphs))}, indices
        )
        for graph in self.graphs:
            points = self._points[graph]
            for index in indices.tolist():
                points.pop(index, None)
            kept = zip(*(known.get(what + graph, ()) for what in (ROWS, HEIGHTS, POINTS)), strict=True)
            for row, height, image in kept:
                points[int(indices[row])] = (float(height), torch.from_numpy(image))

    def state(self, indices: Int64Array) -> dict[str, npt.NDArray[Any]]:
        """What is known of the images at `indices`, for `restore`."""
        known = {name: worst[indices].numpy() for name, worst in self.worst.items()}
        known |= {_margin(name): largest[indices].numpy() for name, largest in self.margins.items()}
        for graph, points in self._points.items():
            rows = [row for row, index in enumerate(indices.tolist()) if index in points]
            if rows:
                kept = [points[int(index)] for index in indices[rows]]
                known[ROWS + graph] = np.array(rows)
                known[HEIGHTS + graph] = np.array([height for height, _ in kept])
                known[POINTS + graph] = torch.stack([image for _, image in kept]).numpy()
        return known

    def progress(self, graph: TargetName) -> Tensor:
        """How far attacks brought each image from its clean margin (0) to the graph's boundary (1), float32."""
        return self._share(graph, self.margins[graph], np.arange(len(self.margins[graph])))

    def _share(self, graph: TargetName, margins: Tensor, indices: Int64Array) -> Tensor:
        start = self.clean[MARGIN + graph][indices].clamp(max=-torch.finfo(torch.float32).tiny)
        return 1 - margins / start

    def standing(self, graph: TargetName) -> Tensor:
        """Which images the graph, or a judge that answers for it, still classifies rightly, bool [images]."""
        return torch.stack([self.worst[name] for name in self._by_graph[graph]]).any(dim=0)

    def undecided(self, indices: Int64Array, graphs: Sequence[TargetName]) -> Tensor:
        """Which images at `indices` still stand on one of the graphs, bool."""
        return torch.stack([self.standing(graph)[indices] for graph in graphs]).any(dim=0)

    def remaining(self, graphs: Sequence[TargetName], near: float = 0.0) -> Int64Array:
        """The positions of images that stand on one of the graphs, and that attacks brought so near its boundary."""
        # progress is NaN where logits are not finite: such images stay
        wanted = [self.standing(graph) & ~(self.progress(graph) < near) for graph in graphs]
        found: Int64Array = torch.stack(wanted).any(dim=0).nonzero()[:, 0].numpy().astype(np.int64)
        return found

    def proportions(self) -> dict[str, Proportion]:
        return {name: Proportion.of(flags) for name, flags in self.worst.items()}


def _margin(graph: TargetName) -> str:
    return MARGIN + graph


def clean_flags(judges: Judges, split: Split, advance: Callable[[int], None]) -> Flags:
    """Which clean images every target classifies rightly, and the margins of the compared graphs."""
    names = (*judges.targets, *(MARGIN + name for name in judges.compared))
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for batch in split.batches():
        for name, target in judges.targets.items():
            logits = target.predict(batch.images).cpu()
            found[name].append(right(logits, batch.labels))
            if name in judges.compared:
                found[MARGIN + name].append(margin(logits, batch.labels))
        advance(len(batch))
    return {name: torch.cat(parts) for name, parts in found.items()}
