"""Networks that plain per-tensor int8 ruins: ONNX Runtime's own static quantisation against ours.

    python benchmarks/collapse.py CHECKPOINT... [--data SOURCE] [--n 2000] [--uneven 1,16,256] [--json FILE]

A checkpoint is one that `toolkit train` wrote. All graphs of a network get the same calibration images and are scored
on the same evaluation images; the difference from the float twin comes with its 95 % bootstrap interval over images.
One thread. `onnxruntime` is its own `quantize_static` behind its own `quant_pre_process`.

With `--uneven` channels between two layers are scaled apart at random by up to that factor, without changing the float
function: long trainings leave networks with depthwise convolutions so, which is why plain int8 is said to
ruin them (Nagel et al. 2019).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime.quantization as ort_quantization
import torch

from toolkit.artifacts import OnnxModel, Split, Splits
from toolkit.config import (
    BenchmarkConfig,
    CalibrationName,
    DataConfig,
    ExportConfig,
    ModelConfig,
    ModelRunConfig,
    QuantizeConfig,
)
from toolkit.evaluators.accuracy import right
from toolkit.evaluators.assignment import find_assignment
from toolkit.evaluators.calibration_choice import choose_calibration
from toolkit.evaluators.environment import environment_record
from toolkit.evaluators.judge import Judge
from toolkit.evaluators.latency import Stopclock
from toolkit.evaluators.saturating_layers import saturates_here
from toolkit.exporters.calibration import CalibrationReader
from toolkit.exporters.equalization import LARGEST, equalized, pairs
from toolkit.exporters.onnx import export_onnx, load_onnx
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.session import OnnxPredictor
from toolkit.paths import public_name
from toolkit.prepare import prepare

Flags = npt.NDArray[np.bool_]
MAX_DROP, RESAMPLES = 0.005, 2000


def plain(fp32: Path, output: Path, images: Split, *, per_channel: bool) -> None:
    """ONNX Runtime's `quantize_static` with uint8 activations and int8 weights, and else its defaults.

    On machines where sums saturate its weights have seven bits, as ours have there and as its manual advises.
    """
    source = output.with_suffix(".prepared.onnx")
    ort_quantization.quant_pre_process(str(fp32), str(source))
    reader = CalibrationReader(images, "image")
    ort_quantization.quantize_static(
        source,
        output,
        reader,
        quant_format=ort_quantization.QuantFormat.QDQ,
        activation_type=ort_quantization.QuantType.QUInt8,
        weight_type=ort_quantization.QuantType.QInt8,
        per_channel=per_channel,
        reduce_range=saturates_here(),
        extra_options={"CalibStridedMinMax": 1},
    )


def graphs(fp32: OnnxModel, splits: Splits, folder: Path, seconds: float) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Every way to quantise: its name, the file, and what was chosen."""
    images = splits.calibration
    for granularity in ("per tensor", "per channel"):
        path = folder / f"plain {granularity}.onnx"
        plain(fp32.path, path, images, per_channel=granularity == "per channel")
        yield f"onnxruntime, {granularity}", path, {}
    judge = Judge(fp32.path, splits.validation, None)
    quantizer = Quantizer(fp32, images, QuantizeConfig(int8=True, calibrate="auto"))
    clock = Stopclock(BenchmarkConfig(batches=(8,), threads=1), images.take(np.arange(8)).images.numpy())
    methods = choose_calibration(quantizer, folder, judge)
    drops = {score.method: score.drop.clean for score in methods.scores}
    tried: tuple[tuple[str, CalibrationName], ...] = (("minmax", "minmax"), ("auto", methods.chosen))
    for name, method in tried:
        chosen = quantizer.with_calibration(method)
        path = folder / f"ours {name}.onnx"
        chosen.write(path)
        yield f"ours, int8, {name}", path, {"calibration": method, "drops": drops}
        work = folder / name
        work.mkdir()
        found = find_assignment(chosen, fp32.path, work, judge, clock, max_drop=MAX_DROP, seconds=seconds)
        path = folder / f"ours {name} auto.onnx"
        chosen.write(path, keep_float=found.keep_float)
        layers = {"keep_float": found.keep_float, "for_accuracy": found.for_accuracy, "layers": len(chosen.layers)}
        yield f"ours, auto, {name}", path, {"calibration": method, **layers, "time": found.ratio.value}


def uneven(fp32: Path, factor: float, output: Path) -> OnnxModel:
    """The same float function, its channels between layers up to `factor` apart, log-uniformly."""
    model, generator = load_onnx(fp32), np.random.default_rng(0)
    times = max(1, math.ceil(math.log(factor, LARGEST) - 1e-9))
    for _ in range(times if factor > 1 else 0):
        step = factor ** (1 / times)
        peaks = {pair: step ** -generator.random(pair.channels) for pair in pairs(model)}
        model = equalized(model, peaks, strength=1.0)
    onnx.save(model, output)
    return OnnxModel(output, "fp32")


def answers(path: Path, split: Split) -> Flags:
    """Which images the graph classifies rightly."""
    predictor = OnnxPredictor(path)
    found = [right(predictor.predict(batch.images), batch.labels) for batch in split.batches()]
    return np.asarray(torch.cat(found).numpy(), dtype=np.bool_)


def difference(ours: Flags, reference: Flags) -> tuple[float, float, float]:
    """Points that are lost, with the bootstrap interval over images."""
    lost = 100 * (reference.astype(float) - ours.astype(float))
    chosen = np.random.default_rng(0).integers(0, len(lost), (RESAMPLES, len(lost)))
    low, high = np.quantile(lost[chosen].mean(axis=1), (0.025, 0.975))
    return float(lost.mean()), float(low), float(high)


def compare(checkpoint: Path, data: DataConfig, seconds: float, factor: float, folder: Path) -> list[dict[str, Any]]:
    """All graphs of one network."""
    prepared = prepare(ModelRunConfig(model=ModelConfig(path=checkpoint), data=data, threads=1))
    evaluation, network = prepared.splits.evaluation, public_name(prepared.model.spec.architecture)
    exported = export_onnx(prepared.model, folder / "exported.onnx", ExportConfig())
    fp32 = uneven(exported.path, factor, folder / "fp32.onnx")
    network += f", uneven {factor:g}" if factor > 1 else ""
    reference = answers(fp32.path, evaluation)
    rows = [_row(network, "float", reference, reference, {})]
    start = time.perf_counter()
    for name, path, more in graphs(fp32, prepared.splits, folder, seconds):
        more = {**more, "seconds": time.perf_counter() - start}
        rows.append(_row(network, name, answers(path, evaluation), reference, more))
        start = time.perf_counter()
    return rows


def _row(network: str, name: str, flags: Flags, reference: Flags, more: dict[str, Any]) -> dict[str, Any]:
    lost, low, high = difference(flags, reference)
    row: dict[str, Any] = {"network": network, "graph": name, "correct": int(flags.sum()), "total": len(flags)}
    row |= {"lost": lost, "low": low, "high": high, **more}
    kept = f"{len(row['keep_float'])} of {row['layers']}" if "layers" in row else ""
    print(
        f"| {network} | {name} | {100 * flags.mean():.2f} | {lost:+.2f} [{low:+.2f}, {high:+.2f}] | {kept} | "
        f"{row.get('calibration', '')} |",
        flush=True,
    )
    return row


def main() -> None:
    """Run all, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--calibration", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the search by time")
    parser.add_argument("--uneven", default="1", help="factors, 1 for the network as it is")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    data = DataConfig(source=arguments.data, evaluation=arguments.n, calibration=arguments.calibration)
    print("| network | graph | accuracy % | points lost | layers left float | calibration |")
    print("|---|---|---|---|---|---|")
    rows = []
    for checkpoint, factor in product(arguments.checkpoints, map(float, arguments.uneven.split(","))):
        with tempfile.TemporaryDirectory() as folder:
            rows += compare(checkpoint, data, arguments.seconds, factor, Path(folder))
        if arguments.json:
            record = {"results": rows, "environment": environment_record(1)}
            arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
