"""What int8 graphs would answer elsewhere: the shipped cnn8, and the same pruned and shortly fine-tuned.

    python benchmarks/portability.py [--data sample] [--images 2000] [--only adversarial] [--json FILE]

For each network: labels that change against the deployed graph here, clean and under the preset's PGD made on the float
network: without graph optimisation, on x86 without VNNI (emulated), under the opsets 18 to 23 (converted; and exported
and quantised anew under each), with weights of seven bits, with symmetric int8 activations, and with float biases. The
time of these variants over that of the deployed graph, interleaved; batches 1 and 64, geometric mean.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from toolkit.artifacts import TorchModel
from toolkit.attacks.planned import PlannedAttack
from toolkit.config import (
    BenchmarkConfig,
    DataConfig,
    ExportConfig,
    ModelConfig,
    ModelRunConfig,
    PruneConfig,
    QuantizeConfig,
    TrainConfig,
)
from toolkit.evaluators.environment import environment_record
from toolkit.evaluators.latency import Stopclock
from toolkit.evaluators.portability import (
    OPSETS,
    VARIANTS,
    Answers,
    JudgedImages,
    compare,
    measure_portability,
    writer_of,
)
from toolkit.evaluators.timing import ratio_interval
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.session import OnnxPredictor
from toolkit.prepare import PreparedAttack, prepare_attack
from toolkit.progress import set_quiet
from toolkit.pruning import prune
from toolkit.reports.portability import portability_record
from toolkit.training.loop import train

ROUNDS = 30


def networks(prepared: PreparedAttack, only: str) -> dict[str, TorchModel]:
    """Those networks whose name holds `only`."""
    found = {"cnn8": prepared.model}
    for name, how, plan in (
        ("cnn8 pruned 0.5, 2 epochs", TrainConfig(objective="standard", epochs=2), None),
        ("cnn8 pruned 0.5, 3 adversarial epochs", TrainConfig(epochs=3), prepared.plan),
    ):
        if only in name:
            pruned = prune(prepared.model, PruneConfig(ratio=0.5)).model
            splits = prepared.splits
            found[name] = train(pruned, splits.train, splits.validation, how, plan, seed=0).model
    return {name: model for name, model in found.items() if only in name}


def judged(prepared: PreparedAttack, model: TorchModel, count: int) -> JudgedImages:
    """Evaluation images, clean and attacked."""
    attack = PlannedAttack(model, prepared.plan, seed=0, precision="float32")
    batches = list(prepared.splits.evaluation.first(count).batches(100))
    attacked = [attack.attack(batch, number, 0) for number, batch in enumerate(batches)]
    return JudgedImages([batch.images for batch in batches], attacked, torch.cat([batch.labels for batch in batches]))


def measure(prepared: PreparedAttack, model: TorchModel, count: int, folder: Path) -> dict[str, Any]:
    """One network."""
    images, calibration = judged(prepared, model, count), prepared.splits.calibration
    margin = prepared.plan.threat.margin(model.spec.normalization)

    def quantise(opset: int, path: Path) -> Quantizer:
        exported = export_onnx(model, folder / f"float-{opset}.onnx", ExportConfig(opset=opset), metadata={})
        quantizer = Quantizer(exported, calibration, QuantizeConfig(int8=True), input_margin=margin)
        quantizer.write(path)
        return quantizer

    deployed = folder / "deployed.onnx"
    quantizer = quantise(20, deployed)
    found = portability_record(measure_portability(deployed, images, folder, writer_of(quantizer)))
    assert found is not None
    reference, anew = Answers.of(OnnxPredictor(deployed), images), []
    for opset in OPSETS:
        path = folder / f"anew-{opset}.onnx"
        quantise(opset, path)
        row = compare(Answers.of(OnnxPredictor(path), images), reference, images, "opset", opset=opset)
        assert row.changed is not None and row.changed_attacked is not None
        anew.append(
            {
                "opset": opset,
                "changed": row.changed.as_dict(),
                "changed_attacked": row.changed_attacked.as_dict(),
                "max_difference": row.max_difference,
            }
        )
    return {**found.model_dump(), "exported_anew": anew, "time_over_deployed": times(deployed, images, folder)}


def times(deployed: Path, images: JudgedImages, folder: Path) -> dict[str, Any]:
    """Of the variants that `measure_portability` left in the folder."""
    files: dict[str, Path] = {"deployed": deployed}
    files |= {str(setting): folder / f"{setting}.onnx" for setting in VARIANTS}
    clock = Stopclock(BenchmarkConfig(batches=(1, 64), threads=1), images.clean[0].numpy())
    seconds = clock.rounds(files, ROUNDS)
    found: dict[str, Any] = {}
    for setting in VARIANTS:
        ratio = ratio_interval(seconds[setting], seconds["deployed"], 0)
        found[setting] = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "rounds": len(seconds[setting])}
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="sample")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--only", default="", help="part of the names of the networks that are measured")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    set_quiet(True)
    data = DataConfig(source=arguments.data)
    prepared = prepare_attack(ModelRunConfig(model=ModelConfig(path=Path("shipped:cnn8")), data=data, threads=1))
    results: dict[str, Any] = {}
    for name, model in networks(prepared, arguments.only).items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(prepared, model, arguments.images, Path(folder))
        print(name, json.dumps(results[name]["time_over_deployed"]), flush=True)
    if arguments.json:
        record = {"data": arguments.data, "networks": results, "environment": environment_record(1)}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
