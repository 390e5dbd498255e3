"""Our integer graphs in ONNX Runtime against OpenVINO running NNCF's int8 of the same float twins.

    make peers
    .venv-peers/bin/python benchmarks/openvino_nncf.py --assignments FILE [--networks ...] [--json FILE]

Networks, pruning and images are those of benchmarks/latency.py, whose JSON says which layers `--precision auto` leaves
float (`--assignments`). NNCF quantises the float twin as OpenVINO reads it (preset mixed, fast bias correction) with
the same calibration images. One thread each; OpenVINO with the hint for latency, one stream, static shapes, its input
bound beforehand, called synchronously; ONNX Runtime as `make_session` opens it, with a dynamic batch. With one thread
neither has a pool that spins, so both stay alive and their blocks of calls alternate, in a new random order every
round. What is measured is CPU time of the process, all its threads together: on a machine that nobody else uses it
equals the time on the clock, and on a shared one it leaves out the time that others took. Ratios are medians of paired
rounds with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from latency import network

from toolkit.artifacts import Split
from toolkit.config import ExportConfig, PruneConfig, QuantizeConfig
from toolkit.evaluators.environment import environment_record
from toolkit.evaluators.timing import collector_off, foreign_load, ratio_interval
from toolkit.exporters.onnx import export_onnx
from toolkit.exporters.quantize import Quantizer
from toolkit.exporters.session import OnnxPredictor, make_session
from toolkit.pruning import prune

Images = npt.NDArray[np.float32]
JUDGED = 1000
BLOCK_S = 0.03


class OpenVino:
    """A model in OpenVINO, on one thread."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @classmethod
    def read(cls, path: Path) -> OpenVino:
        """A float ONNX file as it is."""
        import openvino

        return cls(openvino.Core().read_model(str(path)))

    def quantized(self, images: Split) -> OpenVino:
        """In NNCF's int8."""
        import nncf

        def prepare(batch: Any) -> Images:
            found: Images = batch.images.numpy()
            return found

        dataset = nncf.Dataset(list(images.batches(1)), prepare)
        how = nncf.QuantizationPreset.MIXED
        return OpenVino(nncf.quantize(self._model.clone(), dataset, preset=how, subset_size=len(images)))

    def caller(self, images: Images) -> Callable[[], object]:
        """A function that infers `images` once."""
        import openvino

        request = self._compiled(images.shape).create_infer_request()
        request.set_input_tensor(openvino.Tensor(images, shared_memory=True))

        base: Any = super(type(request), request)  # the wrapper around it would collect the outputs, in Python's time
        return lambda: base.infer({}, share_outputs=True, decode_strings=False)

    def answers(self, images: Images) -> Images:
        """Logits of `images`."""
        return np.asarray(self._compiled(images.shape)(images)[0], dtype=np.float32)

    def kernels(self, images: Images) -> list[dict[str, Any]]:
        """What runs: by node its type, kernel and microseconds."""
        request = self._compiled(images.shape, {"PERF_COUNT": True}).create_infer_request()
        for _ in range(20):
            request.infer([images])
        return [
            {"node": row.node_name, "type": row.node_type, "kernel": row.exec_type, "us": row.real_time.microseconds}
            for row in request.get_profiling_info()
            if row.real_time.microseconds
        ]

    def _compiled(self, shape: tuple[int, ...], more: Mapping[str, Any] | None = None) -> Any:
        import openvino

        model = self._model.clone()
        model.reshape(list(shape))
        one = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
        return openvino.Core().compile_model(model, "CPU", {**one, **(more or {})})


def onnxruntime_caller(path: Path, images: Images) -> Callable[[], object]:
    """A function that runs a session of one thread once on `images`."""
    session = make_session(path, threads=1)
    feed = {session.get_inputs()[0].name: images}
    return lambda: session.run(None, feed)


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time per call, of a block of calls after a warm-up."""
    call()
    start = time.process_time()
    call()
    count = int(np.clip(BLOCK_S / max(time.process_time() - start, 1e-7), 1, 500))
    for _ in range(count // 4):
        call()
    start = time.process_time()
    for _ in range(count):
        call()
    return (time.process_time() - start) / count


def compare(callers: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, npt.NDArray[np.float64]]:
    """CPU seconds per call, [rounds]."""
    generator = np.random.default_rng(0)
    found: dict[str, list[float]] = {name: [] for name in callers}
    with collector_off():
        for _ in range(rounds):
            for name in generator.permutation(list(callers)):
                found[str(name)].append(cpu_seconds(callers[str(name)]))
    return {name: np.array(times) for name, times in found.items()}


def agreement(reference: Images, other: Images) -> float:
    """Share of images with the same label."""
    return float((reference.argmax(1) == other.argmax(1)).mean())


def measure(
    name: str, ratio: float, keep_float: list[str], batches: list[int], rounds: int, *, profile: bool
) -> list[dict[str, Any]]:
    """All batch sizes of one network pruned by `ratio`."""
    model, images = network(name)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fp32 = export_onnx(prune(model, PruneConfig(ratio=ratio)).model, folder / "fp32.onnx", ExportConfig())
        Quantizer(fp32, images, QuantizeConfig(int8=True)).write(folder / "ours.onnx", keep_float=keep_float)
        peer = OpenVino.read(fp32.path).quantized(images)
        judged = images.take(np.arange(min(JUDGED, len(images)))).images.numpy()
        reference = OnnxPredictor(fp32.path).predict(torch.from_numpy(judged)).numpy()
        ours = OnnxPredictor(folder / "ours.onnx").predict(torch.from_numpy(judged)).numpy()
        same = {"ours": agreement(reference, ours), "openvino": agreement(reference, peer.answers(judged))}
        for batch in batches:
            pixels = np.ascontiguousarray(np.resize(judged, (batch, *judged.shape[1:])))
            callers = {
                "ours": onnxruntime_caller(folder / "ours.onnx", pixels),
                "openvino": peer.caller(pixels),
                "onnxruntime float": onnxruntime_caller(fp32.path, pixels),
                "openvino float": OpenVino.read(fp32.path).caller(pixels),
            }
            with foreign_load() as load:
                times = compare(callers, rounds)
            found = ratio_interval(times["ours"], times["openvino"])
            row = {"network": name, "ratio": ratio, "batch": batch, "agreement": same, "foreign_load": load()}
            row |= {"ms": {key: 1000 * float(np.median(value)) for key, value in times.items()}}
            row |= {"over_openvino": found.value, "low": found.low, "high": found.high, "keep_float": keep_float}
            if profile:
                row["openvino_kernels"] = peer.kernels(pixels)
            rows.append(row)
            show(row)
    return rows


def show(row: dict[str, Any]) -> None:
    """One row of the table."""
    times = " | ".join(f"{row['ms'][key]:.3f}" for key in ("onnxruntime float", "openvino float", "ours", "openvino"))
    print(
        f"| {row['network']} | {row['ratio']:g} | {row['batch']} | {times} | "
        f"{row['over_openvino']:.2f} [{row['low']:.2f}, {row['high']:.2f}] | {row['foreign_load']:.0%} |",
        flush=True,
    )


def main() -> None:
    """Run all, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assignments", type=Path, required=True, help="JSON of benchmarks/latency.py")
    parser.add_argument("--networks", default="cnn8,resnet18")
    parser.add_argument("--ratios", default="0,0.5,0.8")
    parser.add_argument("--batches", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--profile", action="store_true", help="keep OpenVINO's kernels and their times")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = {
        (row["network"], row["ratio"]): row["assignment"]["keep_float"]
        for row in json.loads(arguments.assignments.read_text())["results"]
    }
    batches, how = list(map(int, arguments.batches.split(","))), {"profile": arguments.profile}
    print("| network | pruned | batch | ORT float | OpenVINO float | ours | OpenVINO int8 | ours / OpenVINO | load |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for name in arguments.networks.split(","):
        for ratio in map(float, arguments.ratios.split(",")):
            rows += measure(name, ratio, known[name, ratio], batches, arguments.rounds, **how)
            if arguments.json:
                record = {"results": rows, "environment": environment_record(1)}
                arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    print(f"median of ours / OpenVINO over {len(rows)} cases: {np.median([row['over_openvino'] for row in rows]):.2f}")


if __name__ == "__main__":
    main()
