"""The engines of quantisation side by side: what `--engine ort` and `--engine inc` write, same network and images.

    python benchmarks/engines.py [MODEL.pt ...] [--data fashion-mnist] [--threat paper] [--n 500] [--untrained resnet18]

For every checkpoint, by engine and calibration method: clean accuracy and share of labels equal to the float twin's on
all evaluation images; robust accuracy on the first `--n` of them (right when clean, under PGD made on the float network
and under PGD made on every integer file's own twin; the same attacked images for every file); integer coverage; bytes;
time over that of the float twin, interleaved. An untrained network has its batch norms settled on noise: nothing but
its coverage, bytes and time mean anything.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.artifacts import (
    ModelSpec,
    Normalization,
    Normalized,
    OnnxModel,
    Proportion,
    Split,
    TorchModel,
)
from toolkit.attacks.planned import PlannedAttack
from toolkit.attacks.surrogate import resolve_precision
from toolkit.config import (
    BenchmarkConfig,
    DataConfig,
    ExportConfig,
    ModelConfig,
    ModelRunConfig,
    QuantizeConfig,
    ThreatConfig,
)
from toolkit.data.images import ArrayImages
from toolkit.evaluators.accuracy import right
from toolkit.evaluators.cost import integer_coverage
from toolkit.evaluators.environment import environment_record
from toolkit.evaluators.latency import benchmark
from toolkit.evaluators.saturation_emulation import twin_of_session
from toolkit.evaluators.surrogate import twin_model
from toolkit.exporters.engines import make_writer
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.session import OnnxPredictor
from toolkit.models.registry import build_network
from toolkit.prepare import PreparedAttack, prepare_attack
from toolkit.progress import set_quiet

WAYS = (("ort", "minmax"), ("ort", "entropy"), ("inc", "minmax"), ("inc", "entropy"))
"""Engine and calibration method."""
BATCHES = (1, 64)
COLOURS = Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))


def write_all(
    model: TorchModel, twin: OnnxModel, calibration: Split, margin: Any, folder: Path
) -> tuple[dict[str, Path], list[dict[str, Any]]]:
    """All integer files, and what writing them took."""
    files, rows = {}, []
    for engine, method in WAYS:
        how = QuantizeConfig.model_validate({"int8": True, "engine": engine, "calibrate": method})
        start = time.perf_counter()
        writer = make_writer(twin, calibration, how, network=model, input_margin=margin)
        path = folder / f"{engine}-{method}.onnx"
        written = writer.write(path)
        took = time.perf_counter() - start
        files[path.stem] = path
        coverage = integer_coverage(path)
        row = {"file": path.stem, "engine": written.engine, "calibration_images": written.calibration_images}
        row |= {"seconds": took, "coverage": coverage.share, "integer_time": coverage.kernel_time_share_integer}
        rows.append({**row, "input_range": written.input_range, "bytes": path.stat().st_size})
    return files, rows


def accuracy(files: Mapping[str, Path], fp32: Path, split: Split) -> dict[str, dict[str, Any]]:
    """Clean accuracy and agreement with the float twin, on all images."""
    predictors = {name: OnnxPredictor(path) for name, path in {"fp32": fp32, **files}.items()}
    labels: list[Tensor] = []
    answers: dict[str, list[Tensor]] = {name: [] for name in predictors}
    for batch in split.batches():
        labels.append(batch.labels)
        for name, predictor in predictors.items():
            answers[name].append(predictor.predict(batch.images).argmax(1))
    truth, joined = torch.cat(labels), {name: torch.cat(found) for name, found in answers.items()}
    return {
        name: {
            "clean": Proportion.of(found == truth).as_dict(),
            "agreement": Proportion.of(found == joined["fp32"]).as_dict(),
        }
        for name, found in joined.items()
    }


def robustness(files: Mapping[str, Path], fp32: Path, prepared: PreparedAttack, count: int) -> dict[str, Any]:
    """Images right when clean and under every attack made, by file."""
    precision = resolve_precision("auto")
    names, split = prepared.model.spec.class_names, prepared.splits.evaluation.first(count)
    makers = {"float": prepared.model}
    for name, path in files.items():
        twin = twin_model(twin_of_session(path), names)
        makers[name] = TorchModel(twin.module, prepared.model.spec)
    attacks = {name: PlannedAttack(model, prepared.plan, seed=0, precision=precision) for name, model in makers.items()}
    predictors = {name: OnnxPredictor(path) for name, path in {"fp32": fp32, **files}.items()}
    standing: dict[str, list[Tensor]] = {name: [] for name in predictors}
    for number, batch in enumerate(split.batches()):
        shown = [batch.images, *(attack.attack(batch, number, 0) for attack in attacks.values())]
        for name, predictor in predictors.items():
            flags = torch.stack([right(predictor.predict(images), batch.labels) for images in shown])
            standing[name].append(flags.all(0))
    return {name: Proportion.of(torch.cat(found)).as_dict() for name, found in standing.items()}


def latency(files: Mapping[str, Path], fp32: Path, shape: tuple[int, int, int], threads: int) -> dict[str, Any]:
    """By batch size and file: time over the float twin's."""
    config = BenchmarkConfig(batches=BATCHES, threads=threads)
    rows = benchmark({"fp32": fp32, **files}, config, shape, baseline="fp32")
    found = {}
    for row in rows:
        interval = {"ratio": row.ratio, "low": row.ratio_low, "high": row.ratio_high}
        found[f"{row.file} at {row.batch}"] = {"ms": row.p50, **interval, "foreign_load": row.foreign_load}
    return found


def trained(path: Path, data: str, threat: str, count: int, threads: int) -> dict[str, Any]:
    """Everything, of one checkpoint."""
    config = ModelRunConfig(
        model=ModelConfig(path=path),
        data=DataConfig(source=data),
        threat=ThreatConfig.model_validate({"preset": threat}),
        threads=threads,
    )
    prepared = prepare_attack(config)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        twin = export_onnx(prepared.model, folder / "fp32.onnx", ExportConfig())
        margin = prepared.plan.threat.margin(prepared.model.spec.normalization)
        files, rows = write_all(prepared.model, twin, prepared.splits.calibration, margin, folder)
        found: dict[str, Any] = {"network": path.stem, "rows": rows, "plan": prepared.plan.record()}
        found["fp32_bytes"] = twin.path.stat().st_size
        found["latency"] = latency(files, twin.path, prepared.model.spec.input_shape, threads)
        found["accuracy"] = accuracy(files, twin.path, prepared.splits.evaluation)
        if count:
            found["robust"] = robustness(files, twin.path, prepared, count)
    return found


def untrained(arch: str, threads: int) -> dict[str, Any]:
    """Coverage, bytes and time of a network with random weights, for colour images of 32x32."""
    shape, names = (3, 32, 32), tuple("0123456789")
    torch.manual_seed(0)
    module = Normalized(build_network(arch, len(names), shape), COLOURS).train()
    with torch.no_grad():
        for _ in range(10):
            module(torch.rand(32, *shape))
    model = TorchModel(module.eval(), ModelSpec(arch, names, shape, COLOURS))
    pixels = np.random.default_rng(0).integers(0, 256, (64, *shape), dtype=np.uint8)
    images = ArrayImages("noise", names, pixels, np.zeros(64, dtype=np.int64))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        twin = export_onnx(model, folder / "fp32.onnx", ExportConfig())
        files, rows = write_all(model, twin, Split(images, np.arange(64, dtype=np.int64)), 0.0, folder)
        timed = latency(files, twin.path, shape, threads)
        return {"network": arch, "rows": rows, "fp32_bytes": twin.path.stat().st_size, "latency": timed}


def show(found: Mapping[str, Any]) -> None:
    """One Markdown table."""
    print(f"\n{found['network']}\n")
    print(
        "| file | clean | same label as float | robust | coverage | bytes | "
        + "".join(f"time/float at {b} | " for b in BATCHES)
    )
    print("| --- " * (6 + len(BATCHES)) + "|")
    for row in ({"file": "fp32", "coverage": 0.0, "bytes": found["fp32_bytes"]}, *found["rows"]):
        name = row["file"]
        shares = [
            found.get("accuracy", {}).get(name, {}).get("clean"),
            found.get("accuracy", {}).get(name, {}).get("agreement"),
            found.get("robust", {}).get(name),
        ]
        cells = [f"{s['value']:.2%} [{s['low']:.2%}, {s['high']:.2%}] (n={s['total']})" if s else "" for s in shares]
        cells += [f"{row['coverage']:.1%}", f"{row['bytes']:,}"]
        for batch in BATCHES:
            timed = found["latency"][f"{name} at {batch}"]
            cells.append(f"{timed['ratio']:.3f} [{timed['low']:.3f}, {timed['high']:.3f}]")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Run all, print tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, default=[])
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--threat", default="paper")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--untrained", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    set_quiet(True)
    everything = []
    for path in arguments.models:
        everything.append(trained(path, arguments.data, arguments.threat, arguments.n, arguments.threads))
        show(everything[-1])
    for arch in filter(None, arguments.untrained.split(",")):
        everything.append(untrained(arch, arguments.threads))
        show(everything[-1])
    if arguments.json:
        record = {"results": everything, "environment": environment_record(arguments.threads)}
        arguments.json.write_text(json.dumps(record, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
