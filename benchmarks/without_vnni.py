"""What a machine without VNNI makes of integer graphs, beside what is emulated of it; run it on such a machine.

    python benchmarks/without_vnni.py [MODEL...] [--data fashion-mnist] [--images 10000] [--json FILE]

Every network is exported and quantised in three forms: weights of 8 bits, weights of 7 bits, and symmetric int8
activations. Of each, on clean test images: the logits of ONNX Runtime's session here against those of the emulation
and of the twin with exact sums (which machines with VNNI compute), labels and accuracy of all three. Then the time of
the forms, interleaved, over that of the float graph; batches 1 and 64, geometric mean.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.artifacts import Proportion, Split
from toolkit.config import BenchmarkConfig, DataConfig, ExportConfig, ModelConfig, ModelRunConfig, QuantizeConfig
from toolkit.evaluators.cost import integer_coverage
from toolkit.evaluators.environment import environment_record, usable_threads
from toolkit.evaluators.latency import Stopclock
from toolkit.evaluators.saturating_layers import saturates_here
from toolkit.evaluators.saturation_emulation import SaturatingTwin
from toolkit.evaluators.surrogate import build_twin
from toolkit.evaluators.timing import ratio_interval
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.session import OnnxPredictor
from toolkit.exporters.variants import Variant
from toolkit.prepare import prepare

FORMS = {"8 bits": Variant(), "7 bits": Variant(reduce_range=True), "signed activations": Variant(signed=True)}
ROUNDS = 20


def compare(path: Path, split: Split) -> dict[str, Any]:
    """The session against its emulation and against exact sums."""
    twin, session = build_twin(path), OnnxPredictor(path)
    emulated = SaturatingTwin(twin, path, integer_coverage(path))
    logits: dict[str, list[Tensor]] = {"here": [], "emulated": [], "exact": []}
    labels = []
    for batch in split.batches(250):
        for name, predictor in (("here", session), ("emulated", emulated), ("exact", twin)):
            logits[name].append(predictor.predict(batch.images))
        labels.append(batch.labels)
    whole, truth = {name: torch.cat(parts) for name, parts in logits.items()}, torch.cat(labels)
    found: dict[str, Any] = {
        "images": len(truth),
        "accuracy": {name: Proportion.of(values.argmax(1) == truth).as_dict() for name, values in whole.items()},
        "overflows": sum(layer.overflows for layer in emulated.layers),
        "sums": sum(layer.pairs for layer in emulated.layers),
    }
    for name in ("emulated", "exact"):
        found[name] = {
            "labels_that_differ": int((whole[name].argmax(1) != whole["here"].argmax(1)).sum()),
            "images_with_equal_bits": int((whole[name] == whole["here"]).all(1).sum()),
            "largest_logit_difference": float((whole[name] - whole["here"]).abs().max()),
        }
    return found


def measure(path: str, data: str, images: int, threads: int) -> dict[str, Any]:
    """All forms of one network."""
    source = DataConfig(source=data, evaluation=images)
    prepared = prepare(ModelRunConfig(model=ModelConfig(path=Path(path)), data=source, threads=threads))
    model, splits = prepared.model, prepared.splits
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        exported = export_onnx(model, folder / "fp32.onnx", ExportConfig())
        quantizer = Quantizer(exported, splits.calibration, QuantizeConfig(reduce_range=False))
        forms, files = {}, {}
        quantizer.write(folder / "calibrated.onnx")
        for form, variant in FORMS.items():
            files[form] = folder / f"{form}.onnx"
            quantizer.write_variant(files[form], variant)
            forms[form] = compare(files[form], splits.evaluation)
        pixels = next(splits.evaluation.batches(64)).images.numpy()
        clock = Stopclock(BenchmarkConfig(batches=(1, 64), threads=threads), pixels)
        seconds = clock.rounds({"float": exported.path, **files}, ROUNDS)
        for form in FORMS:
            ratio = ratio_interval(seconds[form], seconds["float"])
            forms[form]["time"] = {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}
    return {"network": path, "forms": forms}


def main() -> None:
    """Run all and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["shipped:cnn8"])
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not saturates_here():
        raise SystemExit("this machine has VNNI (or tells no features): run it on one without")
    threads = usable_threads(arguments.threads)
    torch.set_num_threads(threads)
    rows = [measure(path, arguments.data, arguments.images, threads) for path in arguments.networks]
    for row in rows:
        for form, found in row["forms"].items():
            accuracy = {name: share["value"] for name, share in found["accuracy"].items()}
            print(row["network"], form, accuracy, found["emulated"], found["exact"], found["overflows"], found["time"])
    if arguments.json:
        record = {"rows": rows, "environment": environment_record(threads)}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
