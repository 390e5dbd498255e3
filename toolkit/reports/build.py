"""From the results of all stages to the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from toolkit import __version__
from toolkit.artifacts import Proportion, Splits, TorchModel
from toolkit.attacks.threat import PgdPlan
from toolkit.config import DataConfig, GateConfig, HardenConfig
from toolkit.evaluators.assignment import Assignment
from toolkit.evaluators.calibration import CalibrationComparison, CalibrationScore
from toolkit.evaluators.calibration_choice import CalibrationChoice
from toolkit.evaluators.cost import IntegerCoverage
from toolkit.evaluators.examination import Examination
from toolkit.evaluators.judge import Drop
from toolkit.evaluators.latency import LatencyRow
from toolkit.evaluators.portability import Portability
from toolkit.evaluators.soundness import Check
from toolkit.evaluators.timing import BUSY, Interval
from toolkit.evaluators.widths import RoundingChoice
from toolkit.exporters.end_to_end import EndToEndComparison
from toolkit.exporters.engine import QuantizedModel
from toolkit.exporters.parity import Parity
from toolkit.paths import public_name
from toolkit.pruning import PruningResult
from toolkit.reports import schema
from toolkit.reports.evidence import robust_accuracy, robustness_parts
from toolkit.reports.portability import portability_record
from toolkit.reports.schema import Change, Report, Share
from toolkit.training.records import TrainingResult


@dataclass(frozen=True)
class Evidence:
    """What the stages of one run came to."""

    original: TorchModel
    splits: Splits
    plan: PgdPlan
    pruned: PruningResult
    tuned: TrainingResult
    macs: tuple[Mapping[str, int], Mapping[str, int]]
    """By module name, of the network that came in and of the one that ships."""
    bytes: tuple[int, int]
    """Of the original network's float ONNX file and of model.onnx."""
    baseline_accuracy: Proportion
    baseline_robust: Proportion
    examination: Examination
    checks: tuple[Check, ...]
    """Beside those of the examination."""
    parity: Mapping[Literal["fp32", "deployed"], Parity]
    end_to_end: EndToEndComparison | None
    quantized: QuantizedModel | None
    calibrations: CalibrationComparison | None
    methods: CalibrationChoice | None
    assignment: Assignment | None
    coverage: IntegerCoverage
    coverages: tuple[schema.ProviderCoverage, ...]
    """Of model.onnx, by provider."""
    targets: tuple[schema.TargetFile, ...]
    portability: Portability
    latency: tuple[LatencyRow, ...]
    environment: Mapping[str, Any]
    timings: Mapping[str, float]
    rounding: RoundingChoice | None = None
    """Where `--round-to auto` searched."""


def build_report(config: HardenConfig, evidence: Evidence) -> Report:
    """Assemble the report; nothing is measured here."""
    worst = evidence.examination.robustness.worst_case
    clean = evidence.examination.robustness.clean
    tuned = evidence.tuned
    return Report(
        schema_version=schema.SCHEMA_VERSION,
        toolkit_version=__version__,
        seed=config.seed,
        model=_model(config, evidence),
        data=_data(config.data, evidence),
        threat=schema.Threat(**evidence.plan.record()),
        finetuning=schema.Finetuning(
            objective=config.finetune.objective,
            epochs=[
                schema.Epoch(
                    epoch=record.epoch,
                    loss=record.loss,
                    accuracy=Share.of(record.accuracy),
                    robust=Share.of(record.robust) if record.robust else None,
                )
                for record in tuned.epochs
            ],
            best_epoch=tuned.best_epoch,
            precision=tuned.precision,
            qat=tuned.learnt is not None,
            qat_from=None if tuned.learnt is None else config.finetune.qat_from,
        ),
        baseline=schema.Baseline(
            accuracy=Share.of(evidence.baseline_accuracy), robust_accuracy=Share.of(evidence.baseline_robust)
        ),
        accuracy=schema.Accuracy(**{name: Share.of(clean[name]) for name in ("torch", "fp32", "deployed")}),
        robust_accuracy=schema.RobustAccuracy(**{"deployed_from_file": None, **robust_accuracy(evidence.examination)}),
        **robustness_parts(evidence.examination, evidence.plan, config.attack.attacks, evidence.checks),
        parity=_parity(evidence),
        end_to_end=_end_to_end(evidence.end_to_end),
        quantization=_quantization(config, evidence),
        targets=list(evidence.targets),
        latency=[schema.Latency(**row.as_dict()) for row in evidence.latency],
        gates=_gates(config.gates, worst["deployed"], clean["deployed"], evidence.coverage.share),
        environment=dict(evidence.environment),
        timings=dict(evidence.timings),
    )


def _model(config: HardenConfig, evidence: Evidence) -> schema.Model:
    spec = evidence.original.spec
    macs_before, macs_after = evidence.macs
    before, after = _layer_parameters(evidence.original), _layer_parameters(evidence.tuned.model)
    layers = [
        schema.Layer(
            name=layer.name,
            filters=Change(before=layer.before, after=layer.after),
            parameters=Change(before=before[layer.name], after=after[layer.name]),
            macs=Change(before=_macs_of(macs_before, layer.name), after=_macs_of(macs_after, layer.name)),
        )
        for layer in evidence.pruned.layers
    ]
    return schema.Model(
        architecture=public_name(spec.architecture),
        class_names=list(spec.class_names),
        input_shape=list(spec.input_shape),
        mean=list(spec.normalization.mean),
        std=list(spec.normalization.std),
        params=Change(before=evidence.pruned.parameters_before, after=evidence.pruned.parameters_after),
        macs=Change(before=sum(macs_before.values()), after=sum(macs_after.values())),
        bytes=Change(before=evidence.bytes[0], after=evidence.bytes[1]),
        prune_ratio=config.prune.ratio,
        prune_scope=config.prune.scope,
        round_to=config.prune.multiple,
        prune_importance=config.prune.importance,
        prune_ratios=dict(config.prune.ratios),
        layers=layers,
        roundings=_roundings(evidence.rounding),
        roundings_foreign_load=evidence.rounding.foreign_load if evidence.rounding else None,
    )


def _roundings(found: RoundingChoice | None) -> list[schema.RoundingRecord]:
    if found is None:
        return []
    return [
        schema.RoundingRecord(
            round_to=one.round_to,
            macs=one.macs,
            ratio=one.time.value,
            ratio_low=one.time.low,
            ratio_high=one.time.high,
            float_ratio=one.float_time.value,
            per_mac=one.per_mac.value,
            graph=one.graph,
            admitted=one.admitted,
            chosen=one.round_to == found.chosen,
        )
        for one in found.tried
    ]


def _layer_parameters(model: TorchModel) -> dict[str, int]:
    return {
        name: sum(parameter.numel() for parameter in module.parameters(recurse=False))
        for name, module in model.network.named_modules()
    }


def _macs_of(macs: Mapping[str, int], layer: str) -> int:
    """Of a layer of the network; the module around it holds it as `network`."""
    return macs.get(f"network.{layer}", 0)


def _data(config: DataConfig, evidence: Evidence) -> schema.Data:
    record = evidence.splits.record()
    count = len(evidence.splits.evaluation)
    choice = f"all {count} of the test part" if config.evaluation is None else f"{count} drawn by class with the seed"
    assert config.source is not None
    known = len(evidence.original.training_hashes) > 0
    return schema.Data(
        incoming_training="known" if known else "unknown",
        source=public_name(config.source),
        evaluation_choice=choice,
        **record,
    )


def _parity(evidence: Evidence) -> list[schema.ParityRecord]:
    return [
        schema.ParityRecord(
            graph=graph,
            batch_size=batch.batch_size,
            max_difference=batch.max_difference,
            relative=batch.relative,
            agreement=Share.of(batch.agreement),
        )
        for graph, parity in evidence.parity.items()
        for batch in parity.batches
    ]


def _end_to_end(found: EndToEndComparison | None) -> schema.EndToEnd | None:
    if found is None:
        return None
    return schema.EndToEnd(
        files=found.agreement.total,
        max_difference=found.max_difference,
        agreement=Share.of(found.agreement),
        lossless_difference=found.lossless_difference,
        lossless_agreement=Share.of(found.lossless_agreement),
    )


def _quantization(config: HardenConfig, evidence: Evidence) -> schema.Quantization:
    coverage, quantized = evidence.coverage, evidence.quantized
    return schema.Quantization(
        engine=quantized.engine if quantized else "none",
        weights=quantized.weights(config.quantize.int8_bits) if quantized else "float32",
        activations=f"uint{quantized.activation_bits} asymmetric" if quantized else "float32",
        calibration=quantized.calibration if quantized else None,
        calibration_images=quantized.calibration_images if quantized else 0,
        learnt_ranges=quantized.learnt_ranges if quantized else 0,
        equalized=quantized.equalized if quantized else 0,
        input_range=list(quantized.input_range) if quantized and quantized.input_range else None,
        clipped_share=evidence.examination.robustness.clipped_share,
        calibration_comparison=_calibrations(config.quantize.calibrate_adversarial, quantized, evidence.calibrations),
        calibration_methods=_methods(evidence.methods),
        assignment=_assignment(config, evidence.assignment),
        coverage=list(evidence.coverages),
        elsewhere=portability_record(evidence.portability),
        constant_channels=dict(quantized.constant_channels) if quantized else {},
        integer_coverage=coverage.share,
        macs_integer=coverage.macs_integer,
        macs_total=coverage.macs_total,
        provider=coverage.provider,
        layers=[
            schema.KernelRow(layer=row.layer, kernel=row.kernel, domain=row.domain, macs=row.macs, integer=row.integer)
            for row in coverage.layers
        ],
        leftovers=dict(coverage.leftovers),
        kernel_time=schema.KernelTime(
            integer_share=coverage.kernel_time_share_integer,
            microseconds={row.layer: row.microseconds for row in coverage.layers if row.microseconds is not None},
            float_islands=[
                schema.IslandRecord(operator=island.operator, count=island.count, time_share=island.time_share)
                for island in coverage.islands
            ],
        ),
        verdict=verdict(
            quantized is not None,
            coverage,
            evidence.latency,
            evidence.assignment,
            activation_bits=quantized.activation_bits if quantized else 8,
        ),
    )


def _methods(found: CalibrationChoice | None) -> list[schema.CalibrationMethod]:
    if found is None:
        return []
    return [
        schema.CalibrationMethod(
            method=score.method,
            accuracy_drop=score.drop.clean,
            robust_drop=score.drop.robust,
            logit_error=score.disturbance,
            images=found.images,
        )
        for score in found.scores
    ]


def _assignment(config: HardenConfig, found: Assignment | None) -> schema.Assignment | None:
    if found is None:
        return None

    def one(ratio: Interval, drop: Drop) -> schema.Assigned:
        times = {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
        return schema.Assigned(**times, accuracy_drop=drop.clean, robust_drop=drop.robust)

    return schema.Assignment(
        keep_float=list(found.keep_float),
        for_accuracy=list(found.for_accuracy),
        max_drop=config.quantize.max_drop,
        images=found.images,
        tried=found.tried,
        foreign_load=found.foreign_load,
        margin_images=found.margin_images,
        sensitivity=[
            schema.Sensitivity(
                layer=one.layer,
                relief=one.relief,
                accuracy_drop=one.drop.clean if one.drop else None,
                robust_drop=one.drop.robust if one.drop else None,
            )
            for one in found.sensitivity
        ],
        shipped=one(found.ratio, found.drop),
        all_integer=one(found.all_integer, found.drop_all_integer),
        pays=found.pays,
    )


def _calibrations(
    share: float, quantized: QuantizedModel | None, found: CalibrationComparison | None
) -> schema.CalibrationComparison | None:
    if quantized is None or found is None:
        return None
    return schema.CalibrationComparison(
        share=share,
        adversarial_images=quantized.adversarial_images,
        attack=found.attack,
        adversarial=_calibration_side(found.adversarial),
        plain=_calibration_side(found.plain),
        accuracy_test=schema.PairedTest.of(found.clean_test),
        robust_test=schema.PairedTest.of(found.robust_test),
        verdict=found.verdict,
    )


def _calibration_side(score: CalibrationScore) -> schema.CalibrationSide:
    return schema.CalibrationSide(
        accuracy=Share.of(score.clean),
        robust_accuracy=Share.of(score.robust),
        clipped_clean=score.clipped_clean,
        clipped_attacked=score.clipped_attacked,
    )


def verdict(
    int8: bool,
    coverage: IntegerCoverage,
    latency: tuple[LatencyRow, ...],
    assignment: Assignment | None = None,
    *,
    activation_bits: int = 8,
) -> str:
    """In one sentence: does the deployed graph run in integers, and does that pay on this machine.

    It holds no measured time, so that equal runs say the same.
    """
    if not int8:
        if assignment is not None and assignment.pays and not assignment.holds:
            return (
                "float: whatever the layers, int8 loses more accuracy than --max-drop allows, and --allow-float "
                "allowed to ship what does not."
            )
        if assignment is not None:
            busy = ", as far as can be told while other processes use the CPU" if assignment.foreign_load > BUSY else ""
            return f"float: int8 does not pay on this machine{busy}, and --allow-float allowed to ship what is faster."
        return "float: --int8 was not given, and --allow-float allowed it."
    what = "int8" if activation_bits == 8 else f"int{activation_bits}"
    rows = [row for row in latency if row.file == "deployed"]
    faster = [str(row.batch) for row in rows if row.ratio_high < 1]
    slower = [str(row.batch) for row in rows if row.ratio_low > 1]
    if not rows:
        pays = "speed was not measured"
    elif len(faster) == len(rows):
        pays = f"{what} pays here"
    elif len(slower) == len(rows):
        pays = f"{what} does NOT pay here: it is slower than the float twin"
    elif faster:
        pays = f"{what} pays at batch {', '.join(faster)} only"
    elif slower:
        pays = f"{what} does NOT pay here: slower at batch {', '.join(slower)}, and no difference to be told elsewhere"
    else:
        pays = "no difference in speed from the float twin can be told here"
    if not all(row.trusted for row in rows):
        pays = "speed cannot be told: other processes used the CPU while it was measured"
    elif assignment is not None and assignment.foreign_load > BUSY:
        pays += (
            " (which layers are integer was chosen while other processes used the CPU: another choice may be faster)"
        )
    if assignment is not None and not assignment.holds:
        pays += "; whatever the layers, it loses more accuracy than --max-drop allows (--allow-float ships float then)"
    why = ""
    if activation_bits == 16 and coverage.share == 0:
        why = " (ONNX Runtime has no kernel that multiplies 16-bit activations: layers compute in float in between)"
    return f"{coverage.share:.1%} of the multiply-accumulates run in integers{why}; {pays}."


def _gates(gates: GateConfig, robust: Proportion, accuracy: Proportion, coverage: float) -> list[schema.Gate]:
    limits = {
        "--min-accuracy": (gates.min_accuracy, accuracy.value),
        "--min-robust": (gates.min_robust, robust.value),
        "--min-integer-coverage": (gates.min_integer_coverage, coverage),
    }
    return [
        schema.Gate(name=name, limit=limit, value=value, met=value >= limit)
        for name, (limit, value) in limits.items()
        if limit is not None
    ]
