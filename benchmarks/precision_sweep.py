"""Other precisions than int8: simulated in torch beside the real graphs that ONNX Runtime runs, on the same images.

    python benchmarks/precision_sweep.py BUNDLE... [--bits 16,8,4,2,1,...] [--n 2000] [--rounds 20] [--json FILE]

Of every bundle of `toolkit harden`, model.pt is simulated at every number of bits (as `toolkit simulate` does), and
model.fp32.onnx is quantised at int8, at int16 activations and at int4 weights (as `toolkit quantize` does). Simulated
and real ones are each attacked by the run's PGD made on the float network and on their own form (the fake-quantised
network; the twin of the graph), all steps on all images; the worse of both counts, per image. One thread.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from toolkit.artifacts import OnnxModel
from toolkit.bundle import read_report
from toolkit.config import BenchmarkConfig, DataConfig, ModelConfig, ModelRunConfig, QuantizeConfig, ThreatConfig
from toolkit.evaluators.cost import integer_coverage
from toolkit.evaluators.environment import environment_record
from toolkit.evaluators.evaluation import Conditions
from toolkit.evaluators.latency import benchmark
from toolkit.evaluators.robustness import evaluate_robustness
from toolkit.evaluators.saturation_emulation import twin_of_session
from toolkit.evaluators.simulation import parse_bits, simulate
from toolkit.evaluators.surrogate import measure_fidelity, twin_model
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.session import OnnxPredictor
from toolkit.prepare import PreparedAttack, prepare_attack

REAL: dict[str, dict[str, int]] = {
    "int8": {},
    "activations int16": {"activation_bits": 16},
    "linear weights int4": {"weight_bits": 4},
}
"""Graphs that ONNX Runtime runs."""
SIMULATED = {"int8": "8/8", "activations int16": "8/16"}
"""The simulated row of the same bits, where all layers of the graph have them."""
COMPARED = 200
"""Images on which a twin is compared with its session."""


def measure(bundle: Path, bits: str, images: int, rounds: int) -> dict[str, Any]:
    """Everything of one bundle."""
    report = read_report(bundle)
    config = ModelRunConfig(
        model=ModelConfig(path=bundle / "model.pt"),
        data=DataConfig(source=report.data.source, evaluation=images),
        threat=ThreatConfig(preset="paper" if report.threat.preset == "paper" else "pixel"),
        threads=1,
    )
    prepared = prepare_attack(config)
    splits = prepared.splits
    wanted = [parse_bits(text) for text in bits.split(",")]
    rows = simulate(prepared.model, splits.calibration, splits.evaluation, wanted, prepared.plan)
    twin = OnnxModel(bundle / "model.fp32.onnx", "fp32")
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder, f"{number}.onnx") for number, name in enumerate(REAL)}
        real = {name: one(prepared, twin, QuantizeConfig(**REAL[name]), path) for name, path in paths.items()}
        how = BenchmarkConfig(threads=1, rounds=rounds)
        timed = benchmark({"fp32": twin.path, **paths}, how, prepared.model.spec.input_shape, baseline="fp32")
    for row in timed:
        if row.file in real:
            real[row.file]["latency"].append(row.as_dict())
    return {
        "bundle": bundle.name,
        "pruned": report.model.prune_ratio,
        "threat": prepared.plan.record(),
        "pgd_steps": prepared.plan.steps,
        "bytes_fp32": twin.path.stat().st_size,
        "simulated": [row.as_dict() for row in rows],
        "real": real,
        "environment": environment_record(1),
    }


def one(prepared: PreparedAttack, twin: OnnxModel, how: QuantizeConfig, path: Path) -> dict[str, Any]:
    """One real graph: written, profiled, attacked."""
    model, evaluation = prepared.model, prepared.splits.evaluation
    margin = prepared.plan.threat.margin(model.spec.normalization)
    Quantizer(twin, prepared.splits.calibration, how, input_margin=margin).write(path)
    coverage, predictor, own = integer_coverage(path, threads=1), OnnxPredictor(path), twin_of_session(path)
    surrogates = {"float": model, "twin": twin_model(own, model.spec.class_names)}
    conditions = Conditions(prepared.plan, model.spec.normalization, 0)
    found = evaluate_robustness(surrogates, {"deployed": predictor}, evaluation, conditions)  # type: ignore[arg-type]
    kernels: dict[str, int] = {}
    for row in coverage.layers:
        kernels[row.kernel] = kernels.get(row.kernel, 0) + 1
    compared = [batch.images for batch in evaluation.first(COMPARED).batches()]
    return {
        "clean": found.clean["deployed"].as_dict(),
        "robust": found.worst_case["deployed"].as_dict(),
        "cells": {row.surrogate: row.robust.as_dict() for row in found.transfers},
        "fidelity": measure_fidelity(own, predictor, compared).as_dict(),
        "integer_coverage": coverage.share,
        "kernels": kernels,
        "leftovers": dict(coverage.leftovers),
        "bytes": path.stat().st_size,
        "latency": [],
    }


def show(found: dict[str, Any]) -> str:
    """The tables of one bundle in Markdown."""
    rows = found["simulated"]
    lines = [
        f"### {found['bundle']}\n",
        "| SIMULATED bits, weights/activations | clean | PGD, worse of both | on it | on float |",
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in rows:
        label = "float" if row["bits"] == "32/32" else row["bits"]
        lines.append(
            f"| {label} | {share(row['clean'])} | {share(row['robust'])} | {row['robust_own']['value']:.2%} "
            f"| {row['robust_transfer']['value']:.2%} |"
        )
    lines += [
        "",
        "| REAL graph | clean | PGD, worse of both | minus simulated | integer MACs | kernels | bytes | time / twin |",
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    by_bits = {row["bits"]: row for row in rows}
    for name, row in found["real"].items():
        other = by_bits.get(SIMULATED.get(name, ""))
        lost = (
            "not comparable"
            if other is None
            else ", ".join(f"{100 * (row[key]['value'] - other[key]['value']):+.2f}" for key in ("clean", "robust"))
        )
        times = "; ".join(
            f"batch {t['batch']}: {t['ratio']:.2f} [{t['ratio_low']:.2f}, {t['ratio_high']:.2f}]"
            for t in row["latency"]
        )
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in row["kernels"].items())
        lines.append(
            f"| {name} | {share(row['clean'])} | {share(row['robust'])} | {lost} | {row['integer_coverage']:.1%} "
            f"| {kernels} | {row['bytes']:,} | {times} |"
        )
    return "\n".join(lines)


def share(found: dict[str, Any]) -> str:
    """A share with its interval."""
    return f"{found['value']:.2%} [{found['low']:.2%}, {found['high']:.2%}]"


def main() -> None:
    """Measure all bundles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--bits", default="16,8,4,2,1,8/16,4/8,2/8,1/8,8/4,4/32,1/32")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    for bundle in arguments.bundles:
        found.append(measure(bundle, arguments.bits, arguments.n, arguments.rounds))
        print(show(found[-1]) + "\n", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
