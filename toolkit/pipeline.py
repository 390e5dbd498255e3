"""`toolkit harden`: prune, fine-tune, export, quantise, evaluate, benchmark, and put it all into a bundle."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit import bundle
from toolkit.artifacts import TorchModel
from toolkit.attacks.ensemble import Pass, compose
from toolkit.attacks.planned import PlannedAttack
from toolkit.attacks.surrogate import resolve_precision
from toolkit.config import HardenConfig, write_settings
from toolkit.errors import DivergedError, ToolkitError
from toolkit.evaluators.accuracy import measure_accuracy
from toolkit.evaluators.cost import IntegerCoverage, integer_coverage, layer_macs
from toolkit.evaluators.environment import environment_record
from toolkit.evaluators.evaluation import Conditions
from toolkit.evaluators.examination import Examination
from toolkit.evaluators.latency import LatencyRow, benchmark
from toolkit.evaluators.portability import JudgedImages, Portability, measure_portability
from toolkit.evaluators.robustness import evaluate_robustness
from toolkit.evaluators.soundness import Check, alarms, end_to_end_differs
from toolkit.exporters.admission import refuse_bits
from toolkit.exporters.engine import float_layers
from toolkit.exporters.engines import check_engine
from toolkit.exporters.integers import preprocess
from toolkit.exporters.onnx import export_onnx, load_onnx, write_metadata
from toolkit.exporters.precision import float_weights
from toolkit.exporters.session import OnnxPredictor, check_provider
from toolkit.exporters.target_kinds import chosen_targets
from toolkit.graphs import Graphs, search_rounding, settled, some_pixels, timed, with_rounding, write_graphs
from toolkit.lineup import Lineup
from toolkit.paths import refuse_inputs
from toolkit.prepare import (
    PreparedAttack,
    inputs_of,
    load_teacher,
    prepare_attack,
    resolved_data,
    resolved_quantize,
    resolved_threat,
    tell_reduced,
    warn_of_unused,
)
from toolkit.progress import notice
from toolkit.pruning import PruningResult, prune
from toolkit.reports.build import Evidence, build_report
from toolkit.reports.markdown import render_markdown
from toolkit.reports.schema import Report, TargetFile
from toolkit.targets import (
    TargetMaker,
    attack_target,
    coverage_by_provider,
    coverage_record,
    make_beside,
    target_record,
)
from toolkit.training.distributed import joined, launched
from toolkit.training.loop import train
from toolkit.training.qat import Rounding, check_qat
from toolkit.training.records import TrainingResult
from toolkit.watch import Stopwatch

BASELINE_IMAGES = 1000
"""So many evaluation images show how robust the network was that came in."""


@dataclass(frozen=True)
class HardenResult:
    """The bundle, and what it claims."""

    output: Path
    report: Report

    @property
    def gates_met(self) -> bool:
        return all(gate.met for gate in self.report.gates)


def check_settings(config: HardenConfig) -> None:
    """Refuse what could not be done in the end: a float graph nobody allowed, attacks or engines that are not there."""
    compose(config.attack.attacks, classes=2, norm=config.threat.norm)
    refuse_bits(config.quantize)
    chosen_targets(config.quantize)
    if config.prune.round_to == "auto" and launched():
        raise ToolkitError(
            "--round-to auto measures in one process, whose choice the others of a training do not learn",
            found="a run of several processes with --round-to auto",
            fix="name the multiple, say --round-to 8, or start it without torchrun",
        )
    if not config.quantize.int8 and not config.allow_float:
        raise ToolkitError(
            "model.onnx would be a float graph",
            found="neither --int8 nor --allow-float",
            fix="add --int8 for an integer graph, or --allow-float to ship a float one",
        )
    if config.quantize.int8:
        check_engine(config.quantize)
    if config.finetune.qat:  # a float graph is allowed: what `--precision auto` came to may be repeated
        check_qat(config.model_copy(update={"quantize": config.quantize.model_copy(update={"int8": True})}))


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
    check_provider(config.benchmark.provider)
    if force:
        refuse_inputs(output, inputs_of(config))
    warn_of_unused(config.finetune)
    watch = Stopwatch()
    with bundle.open_workspace(output, force=force, resume=resume) as workspace:
        with watch.stage("load"):
            prepared = prepare_attack(config)
            teacher = load_teacher(config.finetune, prepared.model.spec, prepared.splits, config.model)
        if config.finetune.qat and not config.quantize.int8:
            notice("--qat: the network learns to be rounded, and ships as a float graph (--allow-float without --int8)")
        asked, config = config.quantize, resolve(config, prepared)
        if asked.int8:
            tell_reduced(asked, config.quantize)
        with watch.stage("prune"):
            rounding = search_rounding(config, prepared.model, prepared.splits, workspace.rounding)
            config = config.model_copy(update={"prune": with_rounding(config.prune, rounding)})
            pruned = prune(prepared.model, config.prune)
        with watch.stage("export"):  # first, so that what cannot be exported or run is not trained in vain
            original = export_onnx(prepared.model, workspace.scratch("original.onnx"), config.export)
            OnnxPredictor(original.path, provider=config.benchmark.provider)
            if config.quantize.int8:
                float_layers(preprocess(load_onnx(original.path)), config.quantize, original.path)
        with watch.stage("finetune"):
            tuned = _finetune(config, prepared, pruned.model, teacher, workspace.training_checkpoint, resume=resume)
        graphs = write_graphs(config, prepared, tuned.model, original, workspace, watch, learnt=tuned.learnt)
        config = settled(config, graphs)
        evidence = _gather(config, prepared, pruned, tuned, graphs, workspace, watch, resume=resume)
        evidence = replace(evidence, rounding=rounding)
        report = build_report(config, evidence)
        _write_documents(config, prepared, report, workspace)
    return HardenResult(output, report)


def assist(config: HardenConfig, *, resume: bool = False) -> None:
    """Train together with the process that runs `harden`, as one of those that torchrun started; write nothing."""
    check_settings(config)
    prepared = prepare_attack(config)
    teacher = load_teacher(config.finetune, prepared.model.spec, prepared.splits, config.model)
    config = resolve(config, prepared)
    _finetune(config, prepared, prune(prepared.model, config.prune).model, teacher, None, resume=resume)


def _finetune(
    config: HardenConfig,
    prepared: PreparedAttack,
    model: TorchModel,
    teacher: TorchModel | None,
    checkpoint: Path | None,
    *,
    resume: bool,
) -> TrainingResult:
    try:
        with joined() as world:
            return train(
                model,
                prepared.splits.train,
                prepared.splits.validation,
                config.finetune,
                prepared.plan,
                seed=config.seed,
                label="fine-tuning",
                checkpoint=checkpoint,
                resume=resume,
                teacher=teacher,
                rounding=rounding_of(config, prepared),
                world=world,
            )
    except DivergedError:
        if not resume and checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        raise


def rounding_of(config: HardenConfig, prepared: PreparedAttack) -> Rounding | None:
    """What the fine-tuning of a resolved configuration rounds to: what the integer graph will; None: nothing."""
    if not config.finetune.qat:
        return None
    margin = prepared.plan.threat.margin(prepared.model.spec.normalization)
    return Rounding(weight_bits=config.quantize.int8_bits, margin=margin)


def resolve(config: HardenConfig, prepared: PreparedAttack) -> HardenConfig:
    """`config` with everything filled in that data set, preset and machine decide."""
    return config.model_copy(
        update={
            "data": resolved_data(config.data, prepared.source),
            "threat": resolved_threat(config.threat, prepared.plan),
            "quantize": resolved_quantize(config.quantize, config.benchmark.provider),
            "threads": prepared.threads,
        }
    )


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
        coverages = coverage_by_provider(graphs.deployed.path, coverage)
    with watch.stage("targets"):
        targets = _targets(config, prepared, tuned.model, graphs)
    with watch.stage("portability"):
        portability = _portability(config, prepared, tuned.model, graphs)
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
        methods=graphs.methods,
        assignment=graphs.assignment,
        coverage=coverage,
        coverages=tuple(map(coverage_record, coverages)),
        targets=targets,
        portability=portability,
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
            activation_bits=config.quantize.activation_bits,
            weight_bits=config.quantize.int8_bits,
            margin=prepared.plan.threat.margin(model.spec.normalization),
            float_weights=float_weights(graphs.fp32.path, graphs.deployed.path),
        )
    changed = config.prune.prunes or config.finetune.objective != "none"
    return lineup.with_network("original", prepared.model) if changed else lineup


def _targets(
    config: HardenConfig, prepared: PreparedAttack, model: TorchModel, graphs: Graphs
) -> tuple[TargetFile, ...]:
    """The files for other runtimes, and what is left of each under the run's PGD."""
    splits, margin = prepared.splits, prepared.plan.threat.margin(model.spec.normalization)
    maker = TargetMaker(graphs.fp32, splits.calibration, splits.evaluation, config.quantize, margin)
    folder, attacked = graphs.deployed.path.parent, splits.evaluation.first(BASELINE_IMAGES)
    records = []
    for made in make_beside(maker, chosen_targets(config.quantize), folder, bundle.DEPLOYED):
        robust = attack_target(folder / made.file, model, attacked, _conditions(config, prepared, model))
        records.append(target_record(made, robust))
    return tuple(records)


def _portability(config: HardenConfig, prepared: PreparedAttack, model: TorchModel, graphs: Graphs) -> Portability:
    """What the deployed graph would answer elsewhere; attacked images are made on the float network."""
    precision = resolve_precision(config.finetune.precision)
    attack = PlannedAttack(model, prepared.plan, seed=config.seed, precision=precision)
    images = JudgedImages.of(prepared.splits.evaluation, attack)
    with tempfile.TemporaryDirectory(prefix="toolkit-elsewhere-") as folder:
        return measure_portability(graphs.deployed.path, images, Path(folder), graphs.variants)


def _latency(config: HardenConfig, prepared: PreparedAttack, graphs: Graphs) -> tuple[LatencyRow, ...]:
    files = {"fp32": graphs.fp32.path, "deployed": graphs.deployed.path, "original": graphs.original.path}
    pixels, shape = some_pixels(config, prepared.splits.evaluation), prepared.model.spec.input_shape
    return benchmark(files, timed(config), shape, baseline="fp32", seed=config.seed, images=pixels)


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
