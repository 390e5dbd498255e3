"""`toolkit harden`: prune, fine-tune, export, quantise, evaluate, benchmark, and put it all into a bundle."""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from toolkit import bundle
from toolkit.artifacts import OnnxModel, Split, TorchModel
from toolkit.attacks.ensemble import Pass, compose
from toolkit.attacks.planned import PlannedAttack
from toolkit.attacks.surrogate import resolve_precision
from toolkit.config import BenchmarkConfig, HardenConfig, write_settings
from toolkit.errors import ToolkitError
from toolkit.evaluators.accuracy import measure_accuracy
from toolkit.evaluators.assignment import Assignment, Judge, find_assignment
from toolkit.evaluators.calibration import CalibrationComparison, compare_calibrations
from toolkit.evaluators.cost import IntegerCoverage, integer_coverage, layer_macs
from toolkit.evaluators.environment import environment_record
from toolkit.evaluators.evaluation import Conditions
from toolkit.evaluators.examination import Examination
from toolkit.evaluators.latency import ImageArray, LatencyRow, Stopclock, benchmark
from toolkit.evaluators.robustness import evaluate_robustness
from toolkit.evaluators.soundness import Check, alarms, end_to_end_differs
from toolkit.exporters.calibration import AdversarialShare
from toolkit.exporters.end_to_end import EndToEndComparison, compare_end_to_end, export_end_to_end
from toolkit.exporters.onnx import export_onnx, write_metadata
from toolkit.exporters.parity import Parity, check_parity, measure_parity
from toolkit.exporters.precision import float_weights
from toolkit.exporters.quantize import QuantizedModel, Quantizer
from toolkit.exporters.session import OnnxPredictor
from toolkit.lineup import Lineup
from toolkit.models.checkpoint import save_checkpoint
from toolkit.prepare import PreparedAttack, describe, load_teacher, prepare_attack, resolved_data, resolved_threat
from toolkit.pruning import PruningResult, prune
from toolkit.reports.build import Evidence, build_report
from toolkit.reports.markdown import render_markdown
from toolkit.reports.schema import Report
from toolkit.training.loop import train
from toolkit.training.records import TrainingResult

BASELINE_IMAGES = 1000
"""So many evaluation images show how robust the network was that came in."""
END_TO_END_IMAGES = 100


@dataclass(frozen=True)
class HardenResult:
    """The bundle, and what it claims."""

    output: Path
    report: Report

    @property
    def gates_met(self) -> bool:
        return all(gate.met for gate in self.report.gates)


class Stopwatch:
    """Seconds by stage, in the order in which the stages ran."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def check_settings(config: HardenConfig) -> None:
    """Refuse what could not be done in the end: a float model.onnx that nobody allowed, attacks that do not exist."""
    compose(config.attack.attacks, classes=2, norm=config.threat.norm)
    if not config.quantize.int8 and not config.allow_float:
        raise ToolkitError(
            "model.onnx would be a float graph",
            found="neither --int8 nor --allow-float",
            fix="add --int8 for an integer graph, or --allow-float to ship a float one",
        )


def harden(config: HardenConfig, output: Path, *, force: bool = False, resume: bool = False) -> HardenResult:
    """Run the whole pipeline and write the bundle to `output`.

    Args:
        config: every setting; what is None is resolved, and the bundle's config.yaml holds the resolved one.
        output: the bundle's folder; appears whole, or not at all.
        force: replace an existing folder.
        resume: continue the fine-tuning of a run to the same `output` that was interrupted.

    Raises:
        ToolkitError: bad input, or a stage that cannot handle the network.
    """
    check_settings(config)
    watch = Stopwatch()
    with bundle.open_workspace(output, force=force, resume=resume) as workspace:
        with watch.stage("load"):
            prepared = prepare_attack(config)
            teacher = load_teacher(config.finetune, prepared.model.spec, prepared.splits, config.model)
        config = resolve(config, prepared)
        with watch.stage("prune"):
            pruned = prune(prepared.model, config.prune)
        with watch.stage("export"):  # first, so that what cannot be exported or run is not trained in vain
            original = export_onnx(prepared.model, workspace.scratch("original.onnx"), config.export)
            OnnxPredictor(original.path, provider=config.benchmark.provider)
        with watch.stage("finetune"):
            tuned = _finetune(config, prepared, pruned.model, teacher, workspace, resume=resume)
        graphs = _write_graphs(config, prepared, tuned.model, original, workspace, watch)
        config = assigned(config, graphs.assignment)
        evidence = _gather(config, prepared, pruned, tuned, graphs, workspace, watch, resume=resume)
        report = build_report(config, evidence)
        _write_documents(config, prepared, report, workspace)
    return HardenResult(output, report)


def _finetune(
    config: HardenConfig,
    prepared: PreparedAttack,
    model: TorchModel,
    teacher: TorchModel | None,
    workspace: bundle.Workspace,
    *,
    resume: bool,
) -> TrainingResult:
    try:
        return train(
            model,
            prepared.splits.train,
            prepared.splits.validation,
            config.finetune,
            prepared.plan,
            seed=config.seed,
            label="fine-tuning",
            checkpoint=workspace.training_checkpoint,
            resume=resume,
            teacher=teacher,
        )
    except ToolkitError:
        if not resume:  # it would only diverge again
            workspace.training_checkpoint.unlink(missing_ok=True)
        raise


def resolve(config: HardenConfig, prepared: PreparedAttack) -> HardenConfig:
    """`config` with everything filled in that data set, preset and machine decide."""
    return config.model_copy(
        update={
            "data": resolved_data(config.data, prepared.source),
            "threat": resolved_threat(config.threat, prepared.plan),
            "threads": prepared.threads,
        }
    )


def assigned(config: HardenConfig, found: Assignment | None) -> HardenConfig:
    """`config` with the layers that a search left float, so that a repeat measures nothing again."""
    if found is None:
        return config
    how = config.quantize
    if not found.pays and config.allow_float:
        how = how.model_copy(update={"int8": False})
    else:
        how = how.model_copy(update={"precision": "int8", "keep_float": (*how.keep_float, *found.keep_float)})
    return config.model_copy(update={"quantize": how})


@dataclass(frozen=True)
class Graphs:
    """The ONNX files of a run, and how faithful they are."""

    original: OnnxModel
    fp32: OnnxModel
    deployed: OnnxModel
    quantized: QuantizedModel | None
    calibrations: CalibrationComparison | None
    assignment: Assignment | None
    """Where `--precision auto` searched."""
    parity_fp32: Parity
    parity_deployed: Parity
    end_to_end: EndToEndComparison | None


def _write_graphs(
    config: HardenConfig,
    prepared: PreparedAttack,
    model: TorchModel,
    original: OnnxModel,
    workspace: bundle.Workspace,
    watch: Stopwatch,
) -> Graphs:
    files, evaluation = workspace.files, prepared.splits.evaluation
    metadata, provider = describe(model, prepared.plan), config.benchmark.provider
    save_checkpoint(model, files / bundle.CHECKPOINT, home=workspace.output)
    with watch.stage("export"):
        fp32 = export_onnx(model, files / bundle.FLOAT_TWIN, config.export, metadata=metadata)
        parity_fp32 = measure_parity(model, OnnxPredictor(fp32.path, provider=provider), evaluation)
        check_parity(parity_fp32)
    quantized = calibrations = assignment = None
    deployed_path = files / bundle.DEPLOYED
    with watch.stage("quantize"):
        if config.quantize.int8:
            quantized, calibrations, assignment = _quantize(config, prepared, model, fp32, workspace)
            write_metadata(deployed_path, metadata)
        if quantized is None or (assignment and not assignment.pays and config.allow_float):
            quantized = calibrations = None
            deployed_path.write_bytes(fp32.path.read_bytes())
        parity_deployed = measure_parity(model, OnnxPredictor(deployed_path, provider=provider), evaluation)
        _check_finite(parity_deployed)
    with watch.stage("end_to_end"):
        end_to_end = _end_to_end(config, model, deployed_path, evaluation, workspace)
    deployed = OnnxModel(deployed_path, "deployed")
    return Graphs(
        original, fp32, deployed, quantized, calibrations, assignment, parity_fp32, parity_deployed, end_to_end
    )


def _quantize(
    config: HardenConfig, prepared: PreparedAttack, model: TorchModel, fp32: OnnxModel, workspace: bundle.Workspace
) -> tuple[QuantizedModel, CalibrationComparison | None, Assignment | None]:
    """The integer graph, what was searched for it, and with attacked calibration images how it fares without."""
    splits, how, plan = prepared.splits, config.quantize, prepared.plan
    path, margin = workspace.files / bundle.DEPLOYED, plan.threat.margin(model.spec.normalization)
    attack = PlannedAttack(model, plan, seed=config.seed, precision=resolve_precision(config.finetune.precision))
    share = AdversarialShare(attack, how.calibrate_adversarial) if how.calibrate_adversarial else None
    quantizer = Quantizer(fp32, splits.calibration, how, input_margin=margin, adversarial=share)
    assignment = _assign(config, prepared, quantizer, attack, fp32, workspace) if how.precision == "auto" else None
    further = assignment.keep_float if assignment else ()
    made = quantizer.write(path, keep_float=further)
    if not how.calibrate_adversarial:
        return made, None, assignment
    without = how.model_copy(update={"calibrate_adversarial": 0.0})
    other = Quantizer(fp32, splits.calibration, without, input_margin=margin)
    plain = other.write(workspace.scratch("plain.onnx"), keep_float=further)
    provider = config.benchmark.provider
    return made, compare_calibrations(made, plain, attack, splits.validation, provider=provider), assignment


def _assign(
    config: HardenConfig,
    prepared: PreparedAttack,
    quantizer: Quantizer,
    attack: PlannedAttack,
    fp32: OnnxModel,
    workspace: bundle.Workspace,
) -> Assignment:
    """Search which layers should be integer, on validation images and this machine."""
    known = Assignment.read(workspace.assignment, fp32.path)
    if known is not None:
        return known
    provider, validation = config.benchmark.provider, prepared.splits.validation
    with tempfile.TemporaryDirectory(prefix="toolkit-assignment-") as folder:
        found = find_assignment(
            quantizer,
            fp32.path,
            Path(folder),
            Judge(fp32.path, validation, attack, provider),
            Stopclock(_timed(config), _pixels(config, validation), seed=config.seed),
            max_drop=config.quantize.max_drop,
            seed=config.seed,
        )
    found.write(workspace.assignment, fp32.path)
    return found


def _timed(config: HardenConfig) -> BenchmarkConfig:
    return config.benchmark.model_copy(update={"threads": config.benchmark.threads or config.threads})


def _pixels(config: HardenConfig, split: Split) -> ImageArray:
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


def _gather(
    config: HardenConfig,
    prepared: PreparedAttack,
    pruned: PruningResult,
    tuned: TrainingResult,
    graphs: Graphs,
    workspace: bundle.Workspace,
    watch: Stopwatch,
    *,
    resume: bool,
) -> Evidence:
    evaluation = prepared.splits.evaluation
    with watch.stage("baseline"):
        baseline = evaluate_robustness(
            {"original": prepared.model},
            {"torch": prepared.model},
            evaluation.first(BASELINE_IMAGES),
            _conditions(config, prepared, prepared.model),
        )
        baseline_accuracy = measure_accuracy(prepared.model, evaluation)
    with watch.stage("evaluate"):
        lineup = _lineup(config, prepared, tuned.model, graphs)
        passes = compose(config.attack.attacks, len(tuned.model.spec.class_names), prepared.plan.threat.norm)
        conditions = _conditions(config, prepared, tuned.model, passes)
        examination = lineup.examine(evaluation, conditions, journals=workspace.journals, resume=resume)
    with watch.stage("profile"):
        coverage = integer_coverage(graphs.deployed.path, provider=config.benchmark.provider)
    checks = end_to_end_differs(graphs.end_to_end)
    _write_headlines(graphs, examination, coverage, alarms((*examination.checks, *checks)))
    with watch.stage("benchmark"):
        latency = _latency(config, prepared, graphs)
    return Evidence(
        original=prepared.model,
        splits=prepared.splits,
        plan=prepared.plan,
        pruned=pruned,
        tuned=tuned,
        macs=(layer_macs(prepared.model), layer_macs(tuned.model)),
        bytes=(graphs.original.path.stat().st_size, graphs.deployed.path.stat().st_size),
        baseline_accuracy=baseline_accuracy,
        baseline_robust=baseline.worst_case["torch"],
        examination=examination,
        checks=checks,
        parity={"fp32": graphs.parity_fp32, "deployed": graphs.parity_deployed},
        end_to_end=graphs.end_to_end,
        quantized=graphs.quantized,
        calibrations=graphs.calibrations,
        assignment=graphs.assignment,
        coverage=coverage,
        latency=latency,
        environment=environment_record(prepared.threads),
        timings=watch.seconds,
    )


def _conditions(
    config: HardenConfig, prepared: PreparedAttack, model: TorchModel, passes: tuple[Pass, ...] = ()
) -> Conditions:
    return Conditions(
        prepared.plan, model.spec.normalization, config.seed, passes=passes, precision=config.finetune.precision
    )


def _lineup(config: HardenConfig, prepared: PreparedAttack, model: TorchModel, graphs: Graphs) -> Lineup:
    """The network before and after, its fake-quantised form and the deployed graph's twin against all graphs."""
    provider, names = config.benchmark.provider, model.spec.class_names
    lineup = Lineup().with_network("float", model).with_target("torch", model)
    lineup = lineup.with_float_twin(graphs.fp32.path, provider=provider)
    integer = graphs.quantized is not None
    lineup = lineup.with_deployed(graphs.deployed.path, names, provider=provider, twin=integer)
    if integer:
        lineup = lineup.with_fake_quantised(
            model,
            prepared.splits.calibration,
            per_channel=config.quantize.per_channel,
            margin=prepared.plan.threat.margin(model.spec.normalization),
            float_weights=float_weights(graphs.fp32.path, graphs.deployed.path),
        )
    changed = config.prune.ratio > 0 or config.finetune.objective != "none"
    return lineup.with_network("original", prepared.model) if changed else lineup


def _latency(config: HardenConfig, prepared: PreparedAttack, graphs: Graphs) -> tuple[LatencyRow, ...]:
    files = {"fp32": graphs.fp32.path, "deployed": graphs.deployed.path, "original": graphs.original.path}
    pixels, shape = _pixels(config, prepared.splits.evaluation), prepared.model.spec.input_shape
    return benchmark(files, _timed(config), shape, baseline="fp32", seed=config.seed, images=pixels)


def _write_documents(
    config: HardenConfig, prepared: PreparedAttack, report: Report, workspace: bundle.Workspace
) -> None:
    files = workspace.files
    write_settings(config, files / bundle.CONFIG, home=workspace.output)
    (files / bundle.REPORT).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (files / bundle.SUMMARY).write_text(render_markdown(report), encoding="utf-8")
    bundle.write_manifest(
        files,
        {
            "schema_version": report.schema_version,
            "toolkit_version": report.toolkit_version,
            "seed": config.seed,
            "splits": prepared.splits.record(),
            "training_images_of_the_checkpoint": len(prepared.model.training_hashes),
            "environment": report.environment,
        },
    )


def _write_headlines(graphs: Graphs, found: Examination, coverage: IntegerCoverage, raised: tuple[Check, ...]) -> None:
    """Let every ONNX file carry its own results; the end-to-end file has the deployed graph inside."""
    folder = graphs.deployed.path.parent
    for name, graph in ((bundle.DEPLOYED, "deployed"), (bundle.END_TO_END, "deployed"), (bundle.FLOAT_TWIN, "fp32")):
        results = {
            "accuracy": found.robustness.clean[graph].as_dict(),
            "robust_accuracy": found.robustness.worst_case[graph].as_dict(),
            "integer_coverage": coverage.share if graph == "deployed" else 0.0,
            "alarms": [check.name for check in raised],
        }
        if (folder / name).exists():
            write_metadata(folder / name, {"results": json.dumps(results)})


def _check_finite(parity: Parity) -> None:
    if not math.isfinite(parity.relative):
        raise ToolkitError(
            "the integer graph gives logits that are no numbers",
            found=f"label agreement with the float network {parity.agreement}",
            fix="calibrate with --calibrate percentile, or on more images with --calibration",
        )
