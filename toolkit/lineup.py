"""Who is attacked and who judges: surrogates and targets of a checkpoint, an ONNX file, or both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from toolkit import __version__
from toolkit.artifacts import Predictor, Split, TorchModel
from toolkit.errors import ToolkitError
from toolkit.evaluators.evaluation import Clock, Conditions
from toolkit.evaluators.examination import Examination, examine
from toolkit.evaluators.fake_quantised import fake_quantise
from toolkit.evaluators.image_files import Gallery
from toolkit.evaluators.journal import Journal
from toolkit.evaluators.saturation_emulation import twin_of_session
from toolkit.evaluators.scoring import SurrogateName, TargetName
from toolkit.evaluators.surrogate import Twin, UnconvertibleGraph, twin_model
from toolkit.exporters.input_range import input_range
from toolkit.exporters.interface import GraphInterface
from toolkit.exporters.onnx import digest_with_weights
from toolkit.exporters.session import OnnxPredictor, Provider
from toolkit.progress import warn


@dataclass(frozen=True)
class Lineup:
    """Surrogates and targets of one evaluation, in the order in which they are reported."""

    surrogates: dict[SurrogateName, TorchModel] = field(default_factory=dict)
    targets: dict[TargetName, Predictor] = field(default_factory=dict)
    twin: Twin | None = None
    input_range: tuple[float, float] | None = None
    """Pixels that the deployed graph's input quantiser represents; None for float graphs."""
    files: tuple[Path, ...] = ()
    facts: tuple[str, ...] = ()
    """What else determines what is attacked and who judges, in words."""

    def with_network(self, name: SurrogateName, model: TorchModel) -> Lineup:
        """Attacks are made on `model` too."""
        return replace(self, surrogates={**self.surrogates, name: model})

    def with_target(self, name: TargetName, target: Predictor) -> Lineup:
        """Attacked images are scored on `target` too."""
        return replace(self, targets={**self.targets, name: target})

    def with_float_twin(self, path: Path, *, provider: Provider = "cpu") -> Lineup:
        """The float twin in `path` judges too."""
        found = self.with_target("fp32", OnnxPredictor(path, provider=provider))
        return replace(found, files=(*self.files, path), facts=(*self.facts, f"fp32 by {provider}"))

    def with_deployed(
        self,
        path: Path,
        class_names: tuple[str, ...],
        *,
        interface: GraphInterface | None = None,
        input_shape: tuple[int, int, int] | None = None,
        provider: Provider = "cpu",
        twin: bool = True,
    ) -> Lineup:
        """The graph in `path` judges, optimised and not; attacks are made on its twin, if it can be made.

        Args:
            path: any ONNX classifier.
            class_names: of the data.
            interface: how it is fed; None: as the file says.
            input_shape: of the images, for files that take any.
            provider: what runs the deployed graph.
            twin: whether to look for one.
        """
        deployed = OnnxPredictor(path, provider=provider, interface=interface)
        plain = OnnxPredictor(path, optimized=False, interface=interface)
        found = self.with_target("deployed", deployed).with_target("deployed_unoptimised", plain)
        ends = _in_pixels(input_range(path), deployed.interface)
        found = replace(found, files=(*self.files, path), input_range=ends)
        found = replace(found, facts=(*self.facts, f"deployed by {provider}"))
        if not twin:
            return found
        try:
            made = twin_of_session(path, interface, input_shape=input_shape, provider=provider)
        except UnconvertibleGraph as error:
            warn(f"{error.problem}: {error.found}; attacks are made without its twin")
            return found
        return replace(found.with_network("twin", twin_model(made, class_names)), twin=made)

    def with_fake_quantised(
        self,
        model: TorchModel,
        calibration: Split,
        *,
        per_channel: bool,
        margin: float,
        float_weights: Collection[str] = (),
        activation_bits: int = 8,
        weight_bits: int = 8,
    ) -> Lineup:
        """Attacks are made on the fake-quantised form of `model` too, unless it has none."""
        try:
            made = fake_quantise(
                model,
                calibration,
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                per_channel=per_channel,
                margin=margin,
                float_weights=float_weights,
            )
        except ToolkitError as error:
            warn(f"{error.problem}: {error.found}; attacks are made without the fake-quantised network")
            return self
        found = self.with_network("fake_quantised", made)
        how = f"ranges from {calibration.digest}, {activation_bits} bits, margin {margin:g}"
        return replace(found, facts=(*self.facts, how))

    def fingerprint(self, split: Split, conditions: Conditions) -> str:
        """Names an evaluation of these graphs, so that it is continued by nothing else."""
        facts: dict[str, Any] = {
            "version": __version__,
            "split": split.labelled_digest,
            "order": hashlib.sha256(split.hashes.tobytes()).hexdigest(),
            "labels": hashlib.sha256(split.labels.tobytes()).hexdigest(),
            "conditions": repr(conditions),
            "targets": {name: repr(getattr(target, "interface", None)) for name, target in self.targets.items()},
            "facts": self.facts,
            "journal": 2,  # its form
            "files": [digest_with_weights(path) for path in self.files],
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name, model in self.surrogates.items():
            digest.update(f"{name} {model.spec.architecture}".encode())
            if name == "twin":
                continue  # its file is counted above
            for value in model.network.state_dict().values():
                digest.update(value.detach().cpu().contiguous().float().numpy().tobytes())
        return digest.hexdigest()

    def journal(self, split: Split, conditions: Conditions, folder: Path) -> Path:
        """The file in which an evaluation of these graphs keeps what is done."""
        return folder / f"{self.fingerprint(split, conditions)[:16]}.sqlite"

    def examine(
        self,
        split: Split,
        conditions: Conditions,
        *,
        journals: Path | None = None,
        resume: bool = False,
        clock: Clock | None = None,
        gallery: Gallery | None = None,
    ) -> Examination:
        """The evidence of robustness.

        Args:
            split: the evaluation images.
            conditions: threat model, attacks, seed.
            journals: the folder in which what is done is kept until all is; None: nowhere.
            resume: go on from what is kept there.
            clock: the time that may be spent.
            gallery: keeps the image files that fool the graph that counts.
        """
        fingerprint = self.fingerprint(split, conditions)
        path = self.journal(split, conditions, journals) if journals else None
        journal = Journal(path, fingerprint, resume=resume)
        conditions = replace(conditions, input_range=self.input_range)
        try:
            found = examine(
                self.surrogates,
                self.targets,
                split,
                conditions,
                twin=self.twin,
                journal=journal,
                clock=clock,
                gallery=gallery,
            )
        except BaseException:
            journal.close()
            raise
        journal.close(discard=not found.not_run)
        return found


def _in_pixels(ends: tuple[float, float] | None, interface: GraphInterface) -> tuple[float, float] | None:
    """The range of the graph's input as pixels in [0, 1], where normalisation or scaling is left to the caller."""
    if ends is None:
        return None
    outside = interface.normalization
    mean, std = (outside.mean, outside.std) if outside else ((0.0,), (1.0,))
    low, high = (
        [end / interface.pixel_scale * spread + centre for spread, centre in zip(std, mean, strict=True)]
        for end in ends
    )
    return max(low), min(high)
