"""Files for other runtimes beside the integer graph (`--target`): written, checked, and scored where they can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolkit.artifacts import OnnxModel, Proportion, Split, TorchModel
from toolkit.config import QuantizeConfig
from toolkit.errors import ToolkitError
from toolkit.evaluators.accuracy import measure_accuracy
from toolkit.evaluators.cost import IntegerCoverage, integer_coverage
from toolkit.evaluators.evaluation import Conditions
from toolkit.evaluators.robustness import evaluate_robustness
from toolkit.evaluators.saturating_layers import saturates_here
from toolkit.evaluators.scoring import SurrogateName
from toolkit.evaluators.surrogate import UnconvertibleGraph, build_twin, twin_model
from toolkit.exporters.half import write_half
from toolkit.exporters.onnx import read_metadata, write_metadata
from toolkit.exporters.parity import Parity, measure_parity
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.session import OnnxPredictor, Provider, why_no_cuda
from toolkit.exporters.target_kinds import TargetKind, target_file
from toolkit.progress import warn
from toolkit.reports import schema
from toolkit.reports.schema import Share

HALF_TOLERANCE = 0.05
"""Largest logit difference of float16, relative to the logits' standard deviation: a unit in its last place is 1e-3."""
NO_TENSORRT = "the toolkit builds no TensorRT engine"


@dataclass(frozen=True)
class TargetResult:
    """One file for another runtime, and what was seen of it."""

    kind: TargetKind
    file: str
    bytes: int
    accuracy: Proportion
    """Clean, by ONNX Runtime on the CPU."""
    parity: Parity
    """With the float twin, on the CPU."""
    coverage: IntegerCoverage
    """On the CPU."""
    cuda_parity: Parity | None
    """With the float twin, on the GPU; None: not run there."""
    untested: Mapping[str, str]
    """Its own provider, if the file was not run there, and why."""
    largest_activation: float | None
    """Of float16 files: the largest magnitude on the calibration images."""

    @property
    def tested_on(self) -> tuple[str, ...]:
        """The providers that ran it."""
        return ("cpu",) if self.cuda_parity is None else ("cpu", "cuda")


@dataclass(frozen=True)
class TargetMaker:
    """Writes and checks the files of one network.

    Args:
        fp32: its float twin.
        calibration: images for ranges.
        evaluation: images that judge.
        how: calibration method, and which layers stay float.
        margin: pixels by which attacked images may leave [0, 1].
    """

    fp32: OnnxModel
    calibration: Split
    evaluation: Split
    how: QuantizeConfig
    margin: float

    def make(self, kind: TargetKind, output: Path) -> TargetResult:
        """Write one file and check it.

        Raises:
            ToolkitError: a network that the target's precision cannot hold.
        """
        largest = None
        if kind.name == "cuda":
            largest = write_half(self.fp32.path, output, self.calibration)
        else:
            plain = {"activation_bits": 8, "weight_bits": 8, "calibrate_adversarial": 0.0, "keep_float_here": ()}
            how = self.how.model_copy(update=plain)
            if how.calibrate == "auto":  # what was chosen for asymmetric grids says nothing of symmetric ones
                how = how.model_copy(update={"calibrate": "minmax"})
            Quantizer(self.fp32, self.calibration, how, input_margin=self.margin).write_tensorrt(output)
        write_metadata(output, {**read_metadata(self.fp32.path), "target": kind.name, "precision": kind.precision})
        return self._check(kind, output, largest)

    def _check(self, kind: TargetKind, path: Path, largest: float | None) -> TargetResult:
        reference, found = OnnxPredictor(self.fp32.path), _exact_session(path)
        parity = measure_parity(reference, found, self.evaluation)
        if kind.name == "cuda" and not parity.relative <= HALF_TOLERANCE:
            raise ToolkitError(
                "the float16 file does not compute what the network computes",
                found=f"logits differ by up to {parity.relative:.1e} of their standard deviation (allowed: "
                f"{HALF_TOLERANCE:.0e})",
                fix="leave --target cuda away: this network needs float32",
            )
        missing: dict[str, str] = {name: why for name, why in untested_providers().items() if name == kind.name}
        cuda = None
        if kind.name == "cuda" and not missing:
            cuda = measure_parity(reference, OnnxPredictor(path, provider="cuda"), self.evaluation)
        return TargetResult(
            kind,
            path.name,
            path.stat().st_size,
            measure_accuracy(found, self.evaluation),
            parity,
            integer_coverage(path),
            cuda,
            missing,
            largest,
        )


def make_beside(maker: TargetMaker, kinds: tuple[TargetKind, ...], folder: Path, name: str) -> tuple[TargetResult, ...]:
    """Every target's file in `folder`, named after the file `name`."""
    return tuple(maker.make(kind, folder / target_file(name, kind)) for kind in kinds)


def untested_providers() -> dict[str, str]:
    """The providers that run nothing here, and why."""
    reason = why_no_cuda()
    return {**({} if reason is None else {"cuda": reason}), "tensorrt": NO_TENSORRT}


@dataclass(frozen=True)
class ProviderCoverage:
    """How much of model.onnx runs in integers on one provider."""

    provider: str
    share: float | None
    """None: not run there."""
    untested: str | None
    """Why."""


def coverage_by_provider(path: Path, known: IntegerCoverage) -> tuple[ProviderCoverage, ...]:
    """The integer coverage of a file on every provider, measured where it runs.

    Args:
        path: the file.
        known: what was measured already, on one of them.
    """
    missing = untested_providers()
    running: tuple[Provider, ...] = ("cpu",) if "cuda" in missing else ("cpu", "cuda")
    measured = {
        provider: known if provider == known.provider else integer_coverage(path, provider=provider)
        for provider in running
    }
    return (
        *(ProviderCoverage(provider, found.share, None) for provider, found in measured.items()),
        *(ProviderCoverage(provider, None, why) for provider, why in missing.items()),
    )


@dataclass(frozen=True)
class TargetRobustness:
    """What is left of a target's file under the run's PGD, on the CPU."""

    robust: Proportion
    surrogates: tuple[SurrogateName, ...]
    """On which the attack was made; the worst counts, per image."""


def attack_target(path: Path, model: TorchModel, split: Split, conditions: Conditions) -> TargetRobustness:
    """Score a file under PGD made on the float network and, of a graph with quantisers, on the file's own twin.

    Args:
        path: the file.
        model: the float network.
        split: images, all of which are attacked.
        conditions: threat model and seed; only the transfer matrix's attack is made.
    """
    surrogates: dict[SurrogateName, TorchModel] = {"float": model}
    try:
        twin = build_twin(path)
        if twin.quantised:
            surrogates["twin"] = twin_model(twin, model.spec.class_names)
    except UnconvertibleGraph as error:
        warn(f"{error.problem}: {error.found}; it is attacked by transfer alone")
    found = evaluate_robustness(surrogates, {"deployed": _exact_session(path)}, split, conditions)
    return TargetRobustness(found.worst_case["deployed"], tuple(surrogates))


def _exact_session(path: Path) -> OnnxPredictor:
    """Runs a file for another runtime with the sums that it has there: this CPU's integer kernels may saturate."""
    return OnnxPredictor(path, optimized=not saturates_here())


def coverage_record(row: ProviderCoverage) -> schema.ProviderCoverage:
    """One provider's row of the report."""
    return schema.ProviderCoverage(provider=row.provider, integer_coverage=row.share, untested=row.untested)


def target_record(found: TargetResult, robustness: TargetRobustness | None = None) -> schema.TargetFile:
    """One file's part of the report."""
    return schema.TargetFile(
        file=found.file,
        target=found.kind.name,
        precision=found.kind.precision,
        bytes=found.bytes,
        accuracy=Share.of(found.accuracy),
        robust_accuracy=None if robustness is None else Share.of(robustness.robust),
        attacked_on=[] if robustness is None else list(robustness.surrogates),
        agreement=Share.of(found.parity.agreement),
        relative=found.parity.relative,
        integer_coverage=found.coverage.share,
        largest_activation=found.largest_activation,
        tested_on=list(found.tested_on),
        untested=dict(found.untested),
    )
