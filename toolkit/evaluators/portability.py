"""What a deployed graph would answer elsewhere: without optimisation, without VNNI, under other opsets, written anew.

Every row compares labels with those of the deployed graph on this machine's CPU, on the same clean and attacked images.
What this machine cannot run is emulated (`saturation_emulation`), and said to be where it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnx
import torch
from onnx import ModelProto
from torch import Tensor

from toolkit.artifacts import Predictor, Proportion, Split
from toolkit.attacks.planned import PlannedAttack
from toolkit.errors import ToolkitError
from toolkit.evaluators.accuracy import right
from toolkit.evaluators.cost import integer_coverage
from toolkit.evaluators.saturating_layers import Spared, saturates_here
from toolkit.evaluators.saturation_emulation import Overflows, SaturatingTwin
from toolkit.evaluators.surrogate import build_twin
from toolkit.exporters.onnx import load_onnx, save_onnx
from toolkit.exporters.session import OnnxPredictor
from toolkit.exporters.variants import Variant, VariantWriter
from toolkit.progress import task

OPSETS = range(18, 24)
LIMIT = 0.005
"""Share of labels that may change before it is a warning."""
FEWEST = 3
"""So few labels are no warning, even where they are a larger share."""
IMAGES, PIXELS = 500, 2**24
"""Evaluation images, and as many attacked ones, at most; fewer where they hold more values than the second."""
BATCH = 100

Setting = Literal[
    "unoptimised",
    "without_vnni",
    "with_vnni",
    "opset",
    "reduce_range",
    "reduce_range_without_vnni",
    "s8s8",
    "float_bias",
]
SAME_FILE: tuple[Setting, ...] = ("unoptimised", "without_vnni", "with_vnni", "opset")
"""Settings under which the very graph that ships is expected to answer as it does here."""
VARIANTS: Mapping[Setting, Variant] = {
    "reduce_range": Variant(reduce_range=True),
    "s8s8": Variant(signed=True),
    "float_bias": Variant(float_bias=True),
}


@dataclass(frozen=True)
class JudgedImages:
    """The images on which all settings are compared."""

    clean: Sequence[Tensor]
    attacked: Sequence[Tensor]
    """As many, or none."""
    labels: Tensor

    @classmethod
    def of(cls, split: Split, attack: PlannedAttack | None = None) -> JudgedImages:
        """The first images of a split, and what the attack makes of them."""
        count = max(1, min(IMAGES, PIXELS // math.prod(split.images.shape)))
        batches = list(split.first(count).batches(BATCH))
        attacked = [attack.attack(batch, number, 0) for number, batch in enumerate(batches)] if attack else []
        return cls([batch.images for batch in batches], attacked, torch.cat([batch.labels for batch in batches]))


@dataclass(frozen=True)
class Answers:
    """Logits of one graph on all of them."""

    clean: Tensor
    attacked: Tensor | None

    @classmethod
    def of(cls, predictor: Predictor, images: JudgedImages) -> Answers:
        """Ask a graph."""
        attacked = torch.cat([predictor.predict(part) for part in images.attacked]) if images.attacked else None
        return cls(torch.cat([predictor.predict(part) for part in images.clean]), attacked)

    def changed(self, before: Answers) -> tuple[Proportion, Proportion | None]:
        """Labels that differ, clean and attacked."""
        attacked = None
        if self.attacked is not None and before.attacked is not None:
            attacked = Proportion.of(self.attacked.argmax(1) != before.attacked.argmax(1))
        return Proportion.of(self.clean.argmax(1) != before.clean.argmax(1)), attacked

    def difference(self, before: Answers) -> float:
        """Largest of a logit."""
        found = float((self.clean - before.clean).abs().max())
        if self.attacked is None or before.attacked is None:
            return found
        return max(found, float((self.attacked - before.attacked).abs().max()))

    def accuracy(self, labels: Tensor) -> tuple[Proportion, Proportion | None]:
        """Right when clean; right clean and attacked."""
        clean = right(self.clean, labels)
        attacked = None if self.attacked is None else Proportion.of(clean & right(self.attacked, labels))
        return Proportion.of(clean), attacked


@dataclass(frozen=True)
class Elsewhere:
    """One setting, against the deployed graph as it runs here."""

    setting: Setting
    opset: int | None = None
    changed: Proportion | None = None
    """Labels of clean images that are others; None: not measured, and `note` says why."""
    changed_attacked: Proportion | None = None
    max_difference: float | None = None
    """Of a logit."""
    accuracy: Proportion | None = None
    robust_accuracy: Proportion | None = None
    integer_coverage: float | None = None
    """In the graph after optimisation, where it is another graph."""
    overflows: int | None = None
    """Of 16-bit sums, on all images, where they are emulated."""
    note: str = ""

    @property
    def warns(self) -> bool:
        """Whether the very graph that ships answers too many images otherwise there."""
        shares = [share for share in (self.changed, self.changed_attacked) if share is not None]
        return self.setting in SAME_FILE and any(share.correct >= FEWEST and share.value > LIMIT for share in shares)


@dataclass(frozen=True)
class Portability:
    """All settings, and what 16-bit sums do in each layer."""

    images: int
    attacked: int
    accuracy: Proportion
    """Of the deployed graph here, on the same images."""
    robust_accuracy: Proportion | None
    rows: tuple[Elsewhere, ...]
    layers: tuple[Overflows, ...]
    spared: tuple[Spared, ...]
    twin_agreement: Proportion | None
    """Images with the same label by the session here and by what emulates a machine like it; None: not emulated."""
    saturates_here: bool

    @property
    def warnings(self) -> tuple[Elsewhere, ...]:
        return tuple(row for row in self.rows if row.warns)

    def row(self, setting: Setting) -> Elsewhere | None:
        """The first with this setting."""
        return next((row for row in self.rows if row.setting == setting), None)


def measure_portability(
    deployed: Path,
    images: JudgedImages,
    folder: Path,
    variants: Callable[[Path, Variant], None] | None = None,
) -> Portability:
    """Compare a deployed graph with itself elsewhere.

    Args:
        deployed: an ONNX classifier with a batch that is free.
        images: on which; attacked ones were made on whatever network the caller attacks.
        folder: for graphs that are written to be compared; the caller's to remove.
        variants: writes the graph anew in another form; None: nothing can.
    """
    measured = _Measured(deployed, images, folder)
    with task("elsewhere", len(OPSETS) + (6 if variants else 2)) as bar:
        rows = [measured.unoptimised()]
        bar.advance()
        emulation = _emulate(deployed, images)
        rows += emulation.same_file(measured.reference)
        bar.advance()
        for opset in OPSETS:
            rows.append(measured.under_opset(opset))
            bar.advance()
        if variants is not None:
            for setting, variant in VARIANTS.items():
                rows += measured.anew(setting, variants, variant)
                bar.advance()
    accuracy, robust = measured.reference.accuracy(images.labels)
    return Portability(
        images=len(images.labels),
        attacked=len(images.labels) if images.attacked else 0,
        accuracy=accuracy,
        robust_accuracy=robust,
        rows=tuple(rows),
        layers=emulation.layers,
        spared=emulation.spared,
        twin_agreement=emulation.agreement(measured.reference),
        saturates_here=emulation.saturates_here,
    )


def writer_of(quantizer: VariantWriter, keep_float: Iterable[str] = ()) -> Callable[[Path, Variant], None]:
    """`variants` for `measure_portability`: what a quantiser wrote, with these further layers float."""
    kept = tuple(keep_float)
    return lambda path, variant: quantizer.write_variant(path, variant, keep_float=kept)


class _Measured:
    """Graphs that this machine runs."""

    def __init__(self, deployed: Path, images: JudgedImages, folder: Path) -> None:
        self._deployed, self._images, self._folder = deployed, images, folder
        self.reference = Answers.of(OnnxPredictor(deployed), images)

    def unoptimised(self) -> Elsewhere:
        answers = Answers.of(OnnxPredictor(self._deployed, optimized=False), self._images)
        return compare(answers, self.reference, self._images, "unoptimised")

    def under_opset(self, opset: int) -> Elsewhere:
        path = self._folder / f"opset-{opset}.onnx"
        try:
            save_onnx(convert_opset(load_onnx(self._deployed), opset), path)
            answers = Answers.of(OnnxPredictor(path), self._images)
        except FAILURES as error:
            return Elsewhere("opset", opset, note=f"cannot be converted: {_reason(error)}")
        return compare(answers, self.reference, self._images, "opset", opset=opset)

    def anew(self, setting: Setting, write: Callable[[Path, Variant], None], variant: Variant) -> list[Elsewhere]:
        """The graph in another form; of weights of seven bits without VNNI too."""
        path = self._folder / f"{setting}.onnx"
        exact = setting == "s8s8" and saturates_here()  # for processors whose sums do not
        reference = (
            Answers.of(OnnxPredictor(self._deployed, optimized=False), self._images) if exact else self.reference
        )
        try:
            write(path, variant)
            answers = Answers.of(OnnxPredictor(path, optimized=not exact), self._images)
            coverage = integer_coverage(path).share
        except FAILURES as error:
            return [Elsewhere(setting, note=f"cannot be written or run: {_reason(error)}")]
        found = [compare(answers, reference, self._images, setting, integer_coverage=coverage)]
        if variant.reduce_range:
            found += _emulate(path, self._images).rows("reduce_range_without_vnni", self.reference)
        return found


FAILURES = (ToolkitError, RuntimeError, onnx.checker.ValidationError)
"""What converters and sessions raise of a graph that has no such form: a row of its own, and no end of the run."""


def _reason(error: Exception) -> str:
    text = error.found if isinstance(error, ToolkitError) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:160]


def compare(
    answers: Answers,
    before: Answers,
    images: JudgedImages,
    setting: Setting,
    *,
    opset: int | None = None,
    integer_coverage: float | None = None,
    overflows: int | None = None,
) -> Elsewhere:
    """The row of one setting."""
    changed, attacked = answers.changed(before)
    accuracy, robust = answers.accuracy(images.labels)
    return Elsewhere(
        setting,
        opset,
        changed,
        attacked,
        answers.difference(before),
        accuracy,
        robust,
        integer_coverage,
        overflows,
    )


def convert_opset(model: ModelProto, opset: int) -> ModelProto:
    """The same graph under another opset.

    Raises:
        RuntimeError: an operator has no form there.
    """
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    converted = onnx.version_converter.convert_version(model, opset)
    onnx.helper.set_model_props(converted, metadata)
    return converted


@dataclass(frozen=True)
class _Emulation:
    """A graph with 16-bit sums, or why there is none."""

    images: JudgedImages
    saturated: Answers | None = None
    exact: Answers | None = None
    layers: tuple[Overflows, ...] = ()
    spared: tuple[Spared, ...] = ()
    note: str = ""
    saturates_here: bool = field(default_factory=saturates_here)

    def same_file(self, session: Answers) -> list[Elsewhere]:
        """Where the file that ships computes otherwise than here; nothing for a float graph.

        A machine that saturates itself shows how true the emulation is; exact sums are what others compute.
        """
        if self.exact is None:
            return self.rows("without_vnni", session)
        if not self.saturates_here:
            return self.rows("without_vnni", self.exact)
        return [*self.rows("without_vnni", session), compare(self.exact, session, self.images, "with_vnni")]

    def rows(self, setting: Setting, before: Answers) -> list[Elsewhere]:
        """With 16-bit sums against other answers; nothing for a float graph."""
        if self.saturated is None:
            return [Elsewhere(setting, note=self.note)] if self.note else []
        overflows = sum(layer.overflows for layer in self.layers)
        return [compare(self.saturated, before, self.images, setting, overflows=overflows)]

    def agreement(self, session: Answers) -> Proportion | None:
        """Of what the session answers with the emulation of a machine like this one."""
        emulated = self.saturated if self.saturates_here else self.exact
        if emulated is None:
            return None
        same = [emulated.clean.argmax(1) == session.clean.argmax(1)]
        if emulated.attacked is not None and session.attacked is not None:
            same.append(emulated.attacked.argmax(1) == session.attacked.argmax(1))
        return Proportion.of(torch.cat(same))


def _emulate(path: Path, images: JudgedImages) -> _Emulation:
    running = integer_coverage(path)
    if not running.macs_integer:
        return _Emulation(images)
    channels, height, width = images.clean[0].shape[1:]
    try:
        twin = build_twin(path, input_shape=(channels, height, width))
    except ToolkitError as error:
        return _Emulation(images, note=f"not emulated: {error.found}")
    saturating = SaturatingTwin(twin, path, running)
    saturated = Answers.of(saturating, images)
    return _Emulation(images, saturated, Answers.of(twin, images), saturating.layers, saturating.spared)
