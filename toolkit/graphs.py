"""The ONNX files of a hardened network: float twin, integer graph, end-to-end graph, and what is chosen for them."""

from __future__ import annotations

import hashlib
import io
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from toolkit import bundle
from toolkit.artifacts import OnnxModel, Split, Splits, TorchModel
from toolkit.attacks.planned import PlannedAttack
from toolkit.attacks.surrogate import resolve_precision
from toolkit.config import BenchmarkConfig, HardenConfig, PruneConfig
from toolkit.data.pixels import PixelStatistics
from toolkit.errors import ToolkitError
from toolkit.evaluators.assignment import Assignment, find_assignment
from toolkit.evaluators.calibration import CalibrationComparison, compare_calibrations
from toolkit.evaluators.calibration_choice import CalibrationChoice, choose_calibration
from toolkit.evaluators.judge import Judge
from toolkit.evaluators.latency import ImageArray, Stopclock
from toolkit.evaluators.portability import writer_of
from toolkit.evaluators.timing import FloatArray
from toolkit.evaluators.widths import Candidates, RoundingChoice, choose_rounding, fingerprint
from toolkit.exporters.calibration import AdversarialShare
from toolkit.exporters.end_to_end import EndToEndComparison, compare_end_to_end, export_end_to_end
from toolkit.exporters.engine import QuantizedModel, Writer
from toolkit.exporters.engines import make_writer
from toolkit.exporters.onnx import export_onnx, write_metadata
from toolkit.exporters.parity import Parity, check_parity, measure_parity
from toolkit.exporters.session import OnnxPredictor
from toolkit.exporters.variants import Variant
from toolkit.locks import locked, stopwatch_lock
from toolkit.models.checkpoint import save_checkpoint
from toolkit.prepare import PreparedAttack, describe, warn_of_other_images
from toolkit.training.qat import LearntRanges, graph_ranges
from toolkit.watch import Stopwatch

END_TO_END_IMAGES = 100


@dataclass(frozen=True)
class Graphs:
    """The ONNX files of a run, and how faithful they are."""

    original: OnnxModel
    fp32: OnnxModel
    deployed: OnnxModel
    quantized: QuantizedModel | None
    calibrations: CalibrationComparison | None
    methods: CalibrationChoice | None
    """Where `--calibrate auto` searched."""
    assignment: Assignment | None
    """Where `--precision auto` searched."""
    parity_fp32: Parity
    parity_deployed: Parity
    end_to_end: EndToEndComparison | None
    variants: Callable[[Path, Variant], None] | None = None
    """Writes the integer graph that ships in other forms, to be compared."""


def write_graphs(
    config: HardenConfig,
    prepared: PreparedAttack,
    model: TorchModel,
    original: OnnxModel,
    workspace: bundle.Workspace,
    watch: Stopwatch,
    *,
    learnt: LearntRanges | None = None,
) -> Graphs:
    """Write all ONNX files of a bundle, and measure that they are what they should be.

    Args:
        config: resolved, but for what is searched here.
        prepared: data and threat model.
        model: the network that ships.
        original: the network that came in.
        workspace: where the bundle grows.
        watch: of the stages.
        learnt: the ranges of activations that the fine-tuning learnt, if it rounded.
    """
    files, evaluation = workspace.files, prepared.splits.evaluation
    trained_on = PixelStatistics.of(prepared.splits.train)
    metadata = {**describe(model, prepared.plan), **trained_on.as_metadata()}
    provider = config.benchmark.provider
    if config.quantize.int8:
        warn_of_other_images(PixelStatistics.of(prepared.splits.calibration), trained_on)
    save_checkpoint(model, files / bundle.CHECKPOINT, home=workspace.output)
    with watch.stage("export"):
        fp32 = export_onnx(model, files / bundle.FLOAT_TWIN, config.export, metadata=metadata)
        parity_fp32 = measure_parity(model, OnnxPredictor(fp32.path, provider=provider), evaluation)
        check_parity(parity_fp32)
    made: _Integer | None = None
    deployed_path = files / bundle.DEPLOYED
    with watch.stage("quantize"):
        if config.quantize.int8:
            made = _quantize(config, prepared, model, fp32, workspace, learnt)
            write_metadata(deployed_path, metadata)
        found = made.assignment if made else None
        better = config.allow_float and found is not None and not (found.pays and found.holds)  # the float graph
        ships = made is not None and not better
        if not ships:
            deployed_path.write_bytes(fp32.path.read_bytes())
        parity_deployed = measure_parity(model, OnnxPredictor(deployed_path, provider=provider), evaluation)
        _check_finite(parity_deployed)
    with watch.stage("end_to_end"):
        end_to_end = _end_to_end(config, model, deployed_path, evaluation, workspace)
    deployed = OnnxModel(deployed_path, "deployed")
    return Graphs(
        original,
        fp32,
        deployed,
        quantized=made.quantized if made and ships else None,
        calibrations=made.calibrations if made and ships else None,
        methods=made.methods if made else None,
        assignment=made.assignment if made else None,
        parity_fp32=parity_fp32,
        parity_deployed=parity_deployed,
        end_to_end=end_to_end,
        variants=made.variants if made and ships else None,
    )


class _Stopclock(Stopclock):
    """Times files while no other run of this user on this machine does."""

    def rounds(self, files: Mapping[str, Path], count: int) -> dict[str, FloatArray]:
        with locked(stopwatch_lock()):  # not for a whole search, which also attacks
            return super().rounds(files, count)


def search_rounding(
    config: HardenConfig, model: TorchModel, splits: Splits, kept: Path | None = None
) -> RoundingChoice | None:
    """The multiple for widths where `--round-to auto` asks for one, on this machine.

    Args:
        config: how the run prunes, exports, quantises and times.
        model: the network that is to be pruned.
        splits: calibration images, and validation images to time with.
        kept: a file that keeps what was found for a run that goes on.

    Returns:
        None: there is nothing to search, or to prune.
    """
    if config.prune.round_to != "auto" or not config.prune.prunes:
        return None
    key = f"{fingerprint(model, config.prune)} {_conditions(config)}"
    known = RoundingChoice.read(kept, key) if kept else None
    if known is not None:
        return known
    clock = _Stopclock(timed(config), some_pixels(config, splits.validation), seed=config.seed)
    with tempfile.TemporaryDirectory(prefix="toolkit-widths-") as folder:
        candidates = Candidates(config.prune, config.export, config.quantize, splits.calibration, Path(folder))
        found = choose_rounding(model, candidates, clock, seed=config.seed)
    if kept:
        found.write(kept, key)
    return found


def with_rounding(config: PruneConfig, found: RoundingChoice | None) -> PruneConfig:
    """`config` with the multiple that was found; where nothing is pruned, the default stands for it."""
    if config.round_to != "auto":
        return config
    return config.model_copy(update={"round_to": found.chosen if found else PruneConfig().round_to})


@dataclass(frozen=True)
class _Integer:
    """The integer graph, and what was compared on the way to it."""

    quantized: QuantizedModel
    calibrations: CalibrationComparison | None
    methods: CalibrationChoice | None
    assignment: Assignment | None
    variants: Callable[[Path, Variant], None]


def _quantize(
    config: HardenConfig,
    prepared: PreparedAttack,
    model: TorchModel,
    fp32: OnnxModel,
    workspace: bundle.Workspace,
    learnt: LearntRanges | None,
) -> _Integer:
    splits, how, plan = prepared.splits, config.quantize, prepared.plan
    path, margin = workspace.files / bundle.DEPLOYED, plan.threat.margin(model.spec.normalization)
    attack = PlannedAttack(model, plan, seed=config.seed, precision=resolve_precision(config.finetune.precision))
    share = AdversarialShare(attack, how.calibrate_adversarial) if how.calibrate_adversarial else None
    ranges = graph_ranges(model, learnt, fp32.path, splits.calibration) if learnt else {}
    quantizer = make_writer(
        fp32, splits.calibration, how, network=model, input_margin=margin, adversarial=share, ranges=ranges
    )
    provider = config.benchmark.provider
    methods = assignment = None
    if how.calibrate == "auto" or how.searches:
        judge = Judge(fp32.path, splits.validation, attack, provider)
        if how.calibrate == "auto":
            with tempfile.TemporaryDirectory(prefix="toolkit-calibration-") as folder:
                methods = choose_calibration(quantizer, Path(folder), judge)
            quantizer = quantizer.with_calibration(methods.chosen)
        if how.searches:
            assignment = _assign(config, prepared, quantizer, judge, fp32, workspace)
    further = assignment.keep_float if assignment else ()
    made, variants = quantizer.write(path, keep_float=further), writer_of(quantizer, further)
    if not how.calibrate_adversarial:
        return _Integer(made, None, methods, assignment, variants)
    without = how.model_copy(update={"calibrate_adversarial": 0.0, "calibrate": made.calibration})
    other = make_writer(fp32, splits.calibration, without, network=model, input_margin=margin)
    plain = other.write(workspace.scratch("plain.onnx"), keep_float=further)
    compared = compare_calibrations(made, plain, attack, splits.validation, provider=provider)
    return _Integer(made, compared, methods, assignment, variants)


def _assign(
    config: HardenConfig,
    prepared: PreparedAttack,
    quantizer: Writer,
    judge: Judge,
    fp32: OnnxModel,
    workspace: bundle.Workspace,
) -> Assignment:
    """Search which layers should be integer, on validation images and this machine."""
    conditions = _conditions(config)
    known = Assignment.read(workspace.assignment, fp32.path, conditions)
    if known is not None:
        return known
    pixels = some_pixels(config, prepared.splits.validation)
    with tempfile.TemporaryDirectory(prefix="toolkit-assignment-") as folder:
        found = find_assignment(
            quantizer,
            fp32.path,
            Path(folder),
            judge,
            _Stopclock(timed(config), pixels, seed=config.seed),
            max_drop=config.quantize.max_drop,
            seed=config.seed,
        )
    found.write(workspace.assignment, fp32.path, conditions)
    return found


def _conditions(config: HardenConfig) -> str:
    """Names everything beside the network that a search by measuring rests on."""
    parts = {"export", "quantize", "benchmark", "threads", "seed", "threat"}
    return hashlib.sha256(config.model_dump_json(include=parts).encode()).hexdigest()


def timed(config: HardenConfig) -> BenchmarkConfig:
    """How the run times files."""
    return config.benchmark.model_copy(update={"threads": config.benchmark.threads or config.threads})


def some_pixels(config: HardenConfig, split: Split) -> ImageArray:
    """As many images as the largest batch takes, if there are so many."""
    images = split.first(max(config.benchmark.batches))
    return images.take(np.arange(len(images))).images.numpy()


def _end_to_end(
    config: HardenConfig, model: TorchModel, deployed: Path, evaluation: Split, workspace: bundle.Workspace
) -> EndToEndComparison | None:
    if not config.export.end_to_end or model.spec.input_shape[0] not in (1, 3):
        return None
    path = workspace.files / bundle.END_TO_END
    export_end_to_end(deployed, path, input_shape=model.spec.input_shape, class_names=model.spec.class_names)
    folder = workspace.scratch("images")
    folder.mkdir()
    encoded = write_images(evaluation.first(END_TO_END_IMAGES), folder)
    return compare_end_to_end(path, encoded, OnnxPredictor(deployed))


def write_images(split: Split, folder: Path) -> tuple[Path, ...]:
    """Write the images of `split` as files: in turn PNG and JPEG (quality 95), every second pair enlarged unevenly."""
    paths = []
    for number, pixels in enumerate(split.images.pixels(split.indices)):
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0).squeeze()))
        if number % 4 >= 2:  # so that resizing and cropping have something to do
            image = image.resize((image.width * 3 // 2, image.height * 2), Image.Resampling.BICUBIC)
        path = folder / f"{number:04d}.{'jpg' if number % 2 else 'png'}"
        buffer = io.BytesIO()
        image.save(buffer, "JPEG" if number % 2 else "PNG", **({"quality": 95} if number % 2 else {}))
        path.write_bytes(buffer.getvalue())
        paths.append(path)
    return tuple(paths)


def settled(config: HardenConfig, graphs: Graphs) -> HardenConfig:
    """`config` with what was searched for its graphs, so that a repeat measures nothing again."""
    how, found = config.quantize, graphs.assignment
    if graphs.quantized is None:
        how = how.model_copy(update={"int8": False})
    else:
        update: dict[str, object] = {"calibrate": graphs.quantized.calibration, "precision": "int8"}
        if found:
            here = tuple(name for name in found.keep_float if name not in found.for_accuracy)
            accurate = tuple(name for name in found.keep_float if name in found.for_accuracy)
            update |= {"keep_float": (*how.keep_float, *accurate), "keep_float_here": (*how.keep_float_here, *here)}
        how = how.model_copy(update=update)
    return config.model_copy(update={"quantize": how})


def _check_finite(parity: Parity) -> None:
    if not math.isfinite(parity.relative):
        raise ToolkitError(
            "the integer graph gives logits that are no numbers",
            found=f"label agreement with the float network {parity.agreement}",
            fix="calibrate with --calibrate percentile, or on more images with --calibration",
        )
