"""What an integer graph loses against its float twin on validation images: clean, and in the worst case."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from toolkit.artifacts import Predictor, Split, derive_seed, evaluation_batch
from toolkit.attacks.ensemble import CLOSE, FAST, SQUARE, Pass, fitting
from toolkit.attacks.losses import margin
from toolkit.attacks.planned import PlannedAttack
from toolkit.attacks.square import square
from toolkit.attacks.surrogate import Surrogate
from toolkit.evaluators.accuracy import right
from toolkit.evaluators.saturation_emulation import twin_of_session
from toolkit.evaluators.surrogate import UnconvertibleGraph
from toolkit.exporters.session import OnnxPredictor, Provider

IMAGES = 5000
"""Validation images on which graphs are compared, at most: they must tell half a point of robust accuracy from none."""
MEMORY = 2**30
"""Bytes that these images, clean and attacked, may take."""
NEAR = 0.4
"""How near the boundary PGD must have brought an image for others to go on with it, of its clean margin."""
CLIMB = Pass("apgd-margin", 20, near=NEAR, exact=True, onward=True)
SEARCH = Pass(SQUARE, 200, near=0.85, onward=True)
"""Short attacks. Of 1.2 points that the whole evidence says a cnn8 for CIFAR-10 loses in the worst case these see 0.7,
and in up to twice the time 0.8 to 0.95. From 0.7 of the way on, they saw 0.5 of 1.2 that an EfficientNet-style network
loses, and longer ones no more; from 0.4 on, longer ones saw 0.9."""
LONG = tuple(how for how in FAST if how.near >= CLOSE)
"""Those of the evidence beside the boundary, made where the short ones leave a graph within what is allowed."""
EDGE = 1000
"""Attacked images whose margins tell how noisy a graph is: the mean square over 75 was up to 30 % chance."""
FLOAT_ROUNDS = 2
"""Of the short Auto-PGD on the float network; an integer graph inherits what they came to, and has one more of its
own."""
STREAM = 4000
"""Seeds of these attacks are apart from others."""


@dataclass(frozen=True, slots=True)
class Drop:
    """What an integer graph loses against its float twin, as shares of the same images; negative: it gains."""

    clean: float
    robust: float | None
    """In the worst case; None: there was no network to make attacks on."""

    @property
    def worst(self) -> float:
        return self.clean if self.robust is None else max(self.clean, self.robust)


@dataclass(frozen=True)
class _Near:
    """The images that PGD brought near the float twin's boundary."""

    rows: Tensor
    """int64 [m], among all images."""
    images: Tensor
    labels: Tensor
    attacked: Tensor


@dataclass(frozen=True)
class _Edge:
    """The attacked images that lie nearest the float twin's boundary, on either side."""

    images: Tensor
    labels: Tensor
    margins: Tensor
    """The float twin's."""


@dataclass(eq=False)
class _Stand:
    """How a graph stands on the images near the boundary, over everything that was tried."""

    predictor: Predictor
    labels: Tensor
    clean: Tensor
    """Margins of the images themselves, below 0."""
    stands: Tensor
    """Which it still classifies rightly."""
    height: Tensor
    """The largest margin so far, above 0 where it is fooled."""
    points: Tensor
    """Where that is."""

    @classmethod
    def begin(cls, predictor: Predictor, near: _Near) -> _Stand:
        """Of clean images and PGD's."""
        logits = predictor.predict(near.images)
        lowest = torch.full((len(near.rows),), -torch.inf)
        made = cls(
            predictor,
            near.labels,
            _below_zero(margin(logits, near.labels)),
            right(logits, near.labels),
            lowest,
            near.attacked.clone(),
        )
        made.judge(near.attacked)
        return made

    def judge(self, attacked: Tensor, rows: Tensor | None = None) -> None:
        """Take attacked images of these rows into account; None: of all."""
        rows = torch.arange(len(self.labels)) if rows is None else rows
        logits = self.predictor.predict(attacked)
        self.stands[rows] &= right(logits, self.labels[rows])
        found = margin(logits, self.labels[rows])
        higher = found > self.height[rows]
        self.height[rows[higher]], self.points[rows[higher]] = found[higher], attacked[higher]

    def left(self, progress: float) -> Tensor:
        """The rows on which it stands, though it was brought so near the boundary."""
        return (self.stands & (1 - self.height / self.clean >= progress)).nonzero()[:, 0]

    def join(self, other: _Stand) -> None:
        """Take into account what the same graph was shown elsewhere."""
        self.stands &= other.stands
        higher = other.height > self.height
        self.height[higher], self.points[higher] = other.height[higher], other.points[higher]

    def copy(self) -> _Stand:
        changing = {name: getattr(self, name).clone() for name in ("stands", "height", "points")}
        return replace(self, **changing)


class _Pursuit:
    """Goes on with attacks where PGD came near the boundary, on each graph's own form.

    Args:
        attack: of the run's plan.
        near: the images.
        twin: the float twin.
        provider: what runs the graphs.
        classes: of the network.
    """

    def __init__(self, attack: PlannedAttack, near: _Near, twin: Predictor, provider: Provider, classes: int) -> None:
        self.near, self._attack, self._provider = near, attack, provider
        channels, height, width = near.images.shape[1:]
        self._shape = (channels, height, width)
        self._long = fitting(LONG, classes)
        self._exact = attack.surrogate.exact()  # beside the boundary gradients in bfloat16 mislead
        self._float = _Stand.begin(twin, near)
        for number in range(FLOAT_ROUNDS):
            self._make(CLIMB, self._exact, [self._float], number)
        self._make(SEARCH, None, [self._float], FLOAT_ROUNDS)

    @cached_property
    def _float_long(self) -> _Stand:
        """The float twin after the long attacks as well."""
        stand = self._float.copy()
        self._make_long(self._exact, [stand])
        return stand

    def standing(self, path: Path, predictor: Predictor) -> Iterator[tuple[Tensor, Tensor]]:
        """On which of the images the graph still stands, and on which the float twin, bool [m] each.

        Twice: after short attacks, and after long ones.
        """
        ours, theirs = _Stand.begin(predictor, self.near), self._float.copy()
        ours.judge(theirs.points)
        surrogate = self._twin(path)
        if surrogate is not None:
            self._make(CLIMB, surrogate, [ours, theirs], FLOAT_ROUNDS)
        # of a graph without a twin PGD alone has come near
        search = SEARCH if surrogate is not None else replace(SEARCH, near=NEAR)
        self._make(search, None, [ours, theirs], FLOAT_ROUNDS + 1)
        yield ours.stands, theirs.stands
        theirs.join(self._float_long)
        ours.judge(theirs.points)
        self._make_long(surrogate, [ours, theirs])
        yield ours.stands, theirs.stands

    def _twin(self, path: Path) -> Surrogate | None:
        """What attacks on a graph are made on; None: it cannot be made differentiable."""
        try:
            twin = twin_of_session(path, input_shape=self._shape, provider=self._provider)
        except UnconvertibleGraph:
            return None
        return Surrogate(twin.module, self._attack.surrogate.normalization, input_shape=self._shape)

    def _make_long(self, surrogate: Surrogate | None, judges: Sequence[_Stand]) -> None:
        for number, how in enumerate(self._long):
            if how.by_queries or surrogate is not None:
                self._make(how, surrogate, judges, FLOAT_ROUNDS + 2 + number)

    def _make(self, how: Pass, surrogate: Surrogate | None, judges: Sequence[_Stand], number: int) -> None:
        """An attack on what stands so near the boundary of the first of the judges."""
        first = judges[0]
        rows = first.left(how.near)
        if not len(rows):
            return
        size = max(1, evaluation_batch(self._shape) // how.copies)
        for chunk, chosen in enumerate(torch.split(rows, size)):
            images, labels, settle = (
                self.near.images[chosen],
                self.near.labels[chosen],
                partial(_settle, judges, chosen),
            )
            start = first.points[chosen] if how.onward else None
            plan = self._attack.plan
            generator = torch.Generator().manual_seed(derive_seed(self._attack.seed, STREAM, number, chunk))
            if surrogate is not None and not how.by_queries:
                how.run(surrogate, images, labels, plan.threat, generator, settle, start)
                continue
            square(
                first.predictor,
                images,
                labels,
                plan.threat,
                self._attack.surrogate.normalization,
                queries=how.steps,
                generator=generator,
                start=start,
                settle=settle,
            )


def _settle(judges: Sequence[_Stand], rows: Tensor, attacked: Tensor, positions: Tensor) -> Tensor:
    """Every judge sees what was found; the first says of what it has seen enough."""
    chosen = rows[positions.cpu()]
    for judge in judges:
        judge.judge(attacked.cpu(), chosen)
    return ~judges[0].stands[chosen]


def images_of(split: Split) -> int:
    """How many images of a split a judge takes."""
    held = 2 * 4 * math.prod(split.images.shape)
    return min(IMAGES, len(split), max(1, MEMORY // held))


class Judge:
    """Clean and attacked validation images, and how the float twin answers them.

    Attacks are the run's PGD, made on the float network, and from where that came near the boundary Auto-PGD on each
    graph's own form (the float network, the integer graph's twin) and searches by queries: whoever attacks an integer
    graph makes use of how its activations are rounded, which PGD on the float network does not see. Short ones tell
    most graphs that lose too much; the long ones of the evidence are made where they do not. Every point that is found
    for an integer graph is judged by the float twin too.

    Args:
        fp32: the float twin.
        split: validation images, of which at most the first 5,000 are taken, fewer of large ones.
        attack: of the run's plan; None: clean images alone.
        provider: what runs the graphs.
    """

    def __init__(self, fp32: Path, split: Split, attack: PlannedAttack | None, provider: Provider = "cpu") -> None:
        self._provider: Provider = provider
        chosen = split.first(images_of(split))
        self.images = len(chosen)
        batches = list(chosen.batches())
        self._labels = torch.cat([batch.labels for batch in batches])
        self._clean = [batch.images for batch in batches]
        self._attacked = [attack.attack(batch, number, 0) for number, batch in enumerate(batches)] if attack else []
        twin = self._predictor(fp32)
        self._logits = _answers(twin, self._clean)
        self._float = self._flags(twin)
        self._edge = self._pursuit = None
        if attack:
            margins = margin(_answers(twin, self._attacked), self._labels)
            progress = 1 - margins / _below_zero(margin(self._logits, self._labels))
            self._edge = self._find_edge(margins, progress)
            near = self._find_near(progress)
            classes = self._logits.shape[1]
            self._pursuit = _Pursuit(attack, near, twin, provider, classes) if near else None

    @property
    def margin_images(self) -> int:
        """Attacked images on whose margins `noise` looks; 0: on clean logits."""
        return 0 if self._edge is None else len(self._edge.labels)

    @property
    def spread(self) -> float:
        """Standard deviation of the float twin's clean logits."""
        return float(self._logits.std())

    def drop(self, path: Path, *, short: bool = False) -> Drop:
        """What the graph in a file loses against the float twin.

        Args:
            path: the file.
            short: without the long attacks.
        """
        *_, last = islice(self._drops(path), 2 if short else None)
        return last

    def exceeds(self, path: Path, allowed: float) -> bool:
        """Whether the graph loses more than is allowed.

        What cheap attacks show is looked at first, and may turn a graph down: that they leave a smaller loss than a
        graph's own rounding makes is the rule, and dearer ones have only been seen to find more.
        """
        return any(drop.worst > allowed for drop in self._drops(path))

    def disturbance(self, path: Path) -> float:
        """Mean squared difference of the clean logits from the float twin's."""
        return float((_answers(self._predictor(path), self._clean) - self._logits).square().mean())

    def noise(self, path: Path) -> float:
        """Mean squared error of what decides: the margins of those attacked images that lie nearest the boundary.

        What an attack finds there grows with it. Without an attack, the clean logits' error.
        """
        if self._edge is None:
            return self.disturbance(path)
        found = margin(self._predictor(path).predict(self._edge.images), self._edge.labels)
        return float((found - self._edge.margins).square().mean())

    def _predictor(self, path: Path) -> OnnxPredictor:
        return OnnxPredictor(path, provider=self._provider)

    def _flags(self, predictor: Predictor) -> tuple[Tensor, Tensor]:
        """Which images are right: clean; clean and attacked, as far as there are attacked ones."""
        clean = right(_answers(predictor, self._clean), self._labels)
        return clean, clean & right(_answers(predictor, self._attacked), self._labels) if self._attacked else clean

    def _drops(self, path: Path) -> Iterator[Drop]:
        """Under PGD alone, after short attacks, and after long ones."""
        predictor = self._predictor(path)
        (clean, ours), (theirs_clean, theirs) = self._flags(predictor), self._float
        yield self._difference(clean, ours, theirs_clean, theirs)
        if self._pursuit is None:
            return
        rows = self._pursuit.near.rows
        for standing in self._pursuit.standing(path, predictor):
            ours, theirs = ours.clone(), theirs.clone()
            for left, stands in zip((ours, theirs), standing, strict=True):
                left[rows] &= stands
            yield self._difference(clean, ours, theirs_clean, theirs)

    def _difference(self, clean: Tensor, robust: Tensor, theirs_clean: Tensor, theirs_robust: Tensor) -> Drop:
        lost = [
            int(theirs.sum() - ours.sum()) / len(ours)  # counts: a loss of just what is allowed is not above it
            for theirs, ours in ((theirs_clean, clean), (theirs_robust, robust))
        ]
        return Drop(lost[0], lost[1] if self._attacked else None)

    def _find_near(self, progress: Tensor) -> _Near | None:
        """The images that the float twin withstands, beside its boundary; None: PGD brought none of them so near."""
        rows = (self._float[1] & (progress >= NEAR)).nonzero()[:, 0]
        if not len(rows):
            return None
        return _Near(rows, torch.cat(self._clean)[rows], self._labels[rows], torch.cat(self._attacked)[rows])

    def _find_edge(self, margins: Tensor, progress: Tensor) -> _Edge | None:
        """None: the float twin is right about no clean image."""
        rows = self._float[0].nonzero()[:, 0]
        rows = rows[(1 - progress[rows]).abs().argsort()[:EDGE]]
        return _Edge(torch.cat(self._attacked)[rows], self._labels[rows], margins[rows]) if len(rows) else None


def _below_zero(margins: Tensor) -> Tensor:
    return margins.clamp(max=-torch.finfo(torch.float32).tiny)


def _answers(predictor: Predictor, batches: Iterable[Tensor]) -> Tensor:
    return torch.cat([predictor.predict(images) for images in batches])
