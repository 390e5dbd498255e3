"""What pruning and integers gain in time: float, all layers integer, and the layers that a search chose.

    python benchmarks/latency.py [--networks cnn8,resnet18] [--ratios 0,0.5,0.8] [--batches 1,8,64] [--json FILE]

cnn8 is the shipped one, pruned but not tuned; resnet18 (32x32, three channels) has random weights, whose speed is that
of trained ones; so accuracy plays no part in the search here. All files of a network are timed side by side in every
round, one session alive at a time; ratios are medians of paired rounds, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.artifacts import ModelSpec, Normalization, Normalized, Split, TorchModel
from toolkit.config import (
    BenchmarkConfig,
    DataConfig,
    ExportConfig,
    ModelConfig,
    ModelRunConfig,
    PruneConfig,
    QuantizeConfig,
)
from toolkit.data.images import ArrayImages
from toolkit.evaluators.assignment import Assignment, find_assignment
from toolkit.evaluators.environment import environment_record, usable_threads
from toolkit.evaluators.judge import Judge
from toolkit.evaluators.latency import Stopclock, benchmark
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import Quantizer
from toolkit.models.networks import resnet18
from toolkit.prepare import prepare
from toolkit.pruning import prune

CLASSES = tuple(map(str, range(10)))
NAMES = {"unpruned": "float, unpruned", "fp32": "float", "int8": "all layers integer", "auto": "layers chosen"}


def network(name: str) -> tuple[TorchModel, Split]:
    """A network, and images to calibrate and to time with."""
    if name == "cnn8":
        data = DataConfig(source="sample")
        prepared = prepare(ModelRunConfig(model=ModelConfig(path=Path("shipped:cnn8")), data=data))
        return prepared.model, prepared.splits.calibration
    torch.manual_seed(0)
    normalization = Normalization((0.5,) * 3, (0.25,) * 3)
    module = Normalized(resnet18(len(CLASSES), (3, 32, 32)), normalization)
    pixels = np.random.default_rng(0).integers(0, 256, (256, 3, 32, 32), dtype=np.uint8)
    module.train()(torch.from_numpy(pixels).float() / 255)
    model = TorchModel(module.eval(), ModelSpec("resnet18", CLASSES, (3, 32, 32), normalization))
    images = ArrayImages("noise", CLASSES, pixels, np.arange(256, dtype=np.int64) % 10)
    return model, Split(images, np.arange(256, dtype=np.int64))


def compare(name: str, ratio: float, config: BenchmarkConfig, folder: Path) -> dict[str, Any]:
    """All files of a network pruned by `ratio`, timed side by side."""
    model, images = network(name)
    files = {"unpruned": export_onnx(model, folder / "unpruned.onnx", ExportConfig()).path}
    pruned = prune(model, PruneConfig(ratio=ratio)).model
    fp32 = export_onnx(pruned, folder / "fp32.onnx", ExportConfig())
    quantizer = Quantizer(fp32, images, QuantizeConfig(int8=True))
    pixels = images.take(np.arange(min(len(images), max(config.batches)))).images.numpy()
    clock, judge = Stopclock(config, pixels), Judge(fp32.path, images, None)
    with tempfile.TemporaryDirectory() as candidates:
        found = find_assignment(quantizer, fp32.path, Path(candidates), judge, clock, max_drop=1.0)
    quantizer.write(folder / "int8.onnx")
    quantizer.write(folder / "auto.onnx", keep_float=found.keep_float)
    files |= {"fp32": fp32.path, "int8": folder / "int8.onnx", "auto": folder / "auto.onnx"}
    shape = pruned.spec.input_shape
    times = {
        baseline: [row.as_dict() for row in benchmark(files, config, shape, baseline=baseline, images=pixels)]
        for baseline in ("fp32", "unpruned")
    }
    return {"network": name, "ratio": ratio, "assignment": _plain(found), "times": times}


def _plain(found: Assignment) -> dict[str, Any]:
    return {key: value for key, value in asdict(found).items() if key not in ("drop", "drop_all_integer", "images")}


def show(result: dict[str, Any]) -> None:
    """Rows of the table: files by batch sizes."""
    rows = {base: {(row["file"], row["batch"]): row for row in found} for base, found in result["times"].items()}
    for (file, batch), row in rows["fp32"].items():
        against = rows["unpruned"][file, batch]
        print(
            f"| {result['network']} | {result['ratio']:g} | {batch} | {NAMES[file]} | {row['p50']:.3f} | "
            f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}] | "
            f"{against['speedup']:.2f} [{against['speedup_low']:.2f}, {against['speedup_high']:.2f}] |",
            flush=True,
        )


def main() -> None:
    """Run all, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="cnn8,resnet18")
    parser.add_argument("--ratios", default="0,0.5,0.8")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    threads = usable_threads(arguments.threads)
    batches = tuple(map(int, arguments.batches.split(",")))
    config = BenchmarkConfig(batches=batches, rounds=arguments.rounds, threads=threads)
    print("| network | pruned | batch | file | ms | time over the float twin | times as fast as unpruned float |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    results = []
    for name in arguments.networks.split(","):
        for ratio in map(float, arguments.ratios.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                results.append(compare(name, ratio, config, Path(folder)))
            show(results[-1])
            print(f"  left float: {', '.join(results[-1]['assignment']['keep_float']) or 'none'}", flush=True)
    if arguments.json:
        record = {"results": results, "environment": environment_record(threads)}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
